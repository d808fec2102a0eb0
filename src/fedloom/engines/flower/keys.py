"""Who is who: the federation's own authority, the server's certificate, and a key for every site."""

import datetime
import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

DAYS = 825
"""How long certificates are valid."""
_ALWAYS = ("localhost", "127.0.0.1")


@dataclass(frozen=True, slots=True)
class Keys:
    """A folder: `ca.crt` and `sites/NAME/` are for others; `ca.key` and `server.key` stay with the server."""

    folder: Path

    @property
    def ca(self) -> Path:
        """Return the authority's certificate."""
        return self.folder / "ca.crt"

    @property
    def certificate(self) -> Path:
        """Return the server's certificate."""
        return self.folder / "server.pem"

    @property
    def certificate_key(self) -> Path:
        """Return the server's key."""
        return self.folder / "server.key"

    def sites(self) -> Mapping[str, Path]:
        """Return the public key of each site, by name."""
        return {path.parent.name: path for path in sorted(self.folder.glob("sites/*/node.pub"))}

    def init(self, hosts: Sequence[str]) -> None:
        """Make the authority and a server certificate for `hosts` and this machine's loopback names.

        Raises:
            ValueError: where the folder holds keys already.
        """
        if self.ca.exists():
            raise ValueError(f"{self.folder} holds keys already: give another --keys folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        authority = ec.generate_private_key(ec.SECP256R1())
        server = ec.generate_private_key(ec.SECP256R1())
        own = _certificate("fedloom authority", authority, authority, ())
        issued = _certificate("fedloom server", server, authority, (*_ALWAYS, *hosts))
        _write(self.ca, own.public_bytes(Encoding.PEM))
        _write_private(self.folder / "ca.key", authority, PrivateFormat.PKCS8)
        _write(self.certificate, issued.public_bytes(Encoding.PEM))
        _write_private(self.certificate_key, server, PrivateFormat.PKCS8)

    def add(self, site: str) -> Path:
        """Make a site's key; return the folder to hand to it, over a channel that is trusted.

        Raises:
            ValueError: where the name is unusable or taken, or there is no authority yet.
        """
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", site):
            raise ValueError(
                f"a site's name must be small letters, digits, - and _, at most 63, got {site!r}"
            )
        if not self.ca.exists():
            raise ValueError(f"{self.folder} holds no keys: `fedloom keys init` makes them")
        folder = self.folder / "sites" / site
        if folder.exists():
            raise ValueError(f"{folder} exists already: remove it to replace the key of {site}")
        folder.mkdir(mode=0o700, parents=True)
        key = ec.generate_private_key(ec.SECP384R1())
        _write_private(folder / "node.key", key, PrivateFormat.OpenSSH)
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        _write(folder / "ca.crt", self.ca.read_bytes())
        # Last: a folder with it is complete.
        _write(folder / "node.pub", public + b"\n")
        self._introduce()
        return folder

    def _introduce(self) -> None:
        """Put the public keys of all sites into each one's folder: what they sign for one another is checked by them."""
        for site in self.sites():
            peers = self.folder / "sites" / site / "peers"
            peers.mkdir(exist_ok=True)
            for other, public in self.sites().items():
                _write(peers / f"{other}.pub", public.read_bytes())

    def renew(self, hosts: Sequence[str] = ()) -> None:
        """Make a new server certificate of the same authority, so that no site needs another folder.

        Args:
            hosts: Besides those that the old one names.

        Raises:
            ValueError: where the authority itself has expired, or its key is not here.
        """
        for path in (self.ca, self.folder / "ca.key", self.certificate):
            if not path.is_file():
                raise ValueError(f"{path} does not exist: `fedloom keys init` makes it")
        check_dates(self.ca, _NEW_AUTHORITY)
        authority = load_pem_private_key((self.folder / "ca.key").read_bytes(), None)
        assert isinstance(authority, ec.EllipticCurvePrivateKey)
        server = ec.generate_private_key(ec.SECP256R1())
        named = (*_ALWAYS, *sorted(self._hosts()), *hosts)
        issued = _certificate("fedloom server", server, authority, named)
        _write_private(self.certificate_key, server, PrivateFormat.PKCS8)
        _write(self.certificate, issued.public_bytes(Encoding.PEM))

    def covers(self, host: str) -> bool:
        """Return whether the server's certificate names `host`."""
        return host in self._hosts()

    def check(self) -> None:
        """Refuse a folder that a server cannot be started with.

        Raises:
            ValueError: naming the file that is missing, or the certificate that has expired.
        """
        for path in (self.ca, self.certificate, self.certificate_key):
            if not path.is_file():
                raise ValueError(f"{path} does not exist: `fedloom keys init` makes it")
        load_pem_private_key(self.certificate_key.read_bytes(), None)
        check_dates(self.ca, _NEW_AUTHORITY)
        check_dates(
            self.certificate, "`fedloom keys renew` makes a new one, and no site needs another"
        )

    def _hosts(self) -> set[str]:
        read = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return {
            *names.get_values_for_type(x509.DNSName),
            *map(str, names.get_values_for_type(x509.IPAddress)),
        }


_NEW_AUTHORITY = (
    "make new keys with `fedloom keys init` in another folder, and hand all sites theirs"
)


def check_dates(certificate: Path, remedy: str) -> None:
    """Refuse a certificate that is not valid now.

    Raises:
        ValueError: with the day, and `remedy`.
    """
    read = x509.load_pem_x509_certificate(certificate.read_bytes())
    now = _now()
    if now > read.not_valid_after_utc:
        day = read.not_valid_after_utc.date().isoformat()
        raise ValueError(f"the certificate {certificate} expired on {day}: {remedy}")
    if now < read.not_valid_before_utc:
        day = read.not_valid_before_utc.isoformat(timespec="minutes")
        raise ValueError(
            f"the certificate {certificate} is valid from {day} on, and it is {now.isoformat(timespec='minutes')}"
            " here: set this machine's clock"
        )


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
) -> x509.Certificate:
    now = _now()
    is_authority = key is issuer
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    by = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fedloom authority")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(
            x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False
        )
        .add_extension(_usage(is_authority), critical=True)
    )
    if hosts:
        names = x509.SubjectAlternativeName([_name(host) for host in dict.fromkeys(hosts)])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(issuer, hashes.SHA256())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _usage(is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> None:
    _write(path, key.private_bytes(Encoding.PEM, form, NoEncryption()), mode=0o600)


def _write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    # The mode is the file's from the start: nobody reads a key between two calls.
    path.unlink(missing_ok=True)  # one that is there would keep its mode
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
