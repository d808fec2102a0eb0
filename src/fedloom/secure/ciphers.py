"""Agreed keys, streams and sealed shares, all by `cryptography`: X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), ChaCha20 and
ChaCha20-Poly1305 (RFC 8439), and signatures by the P-384 keys that sites join with (ECDSA, FIPS 186-5).
"""

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

KEY_BYTES = 32
TAG_BYTES = 16


def check_installed() -> None:
    """Refuse sums that nothing could mask.

    Raises:
        ValueError: where cryptography is not installed.
    """
    if importlib.util.find_spec("cryptography") is None:
        raise ValueError(
            "secure needs the package cryptography, which is not installed: pip install 'fedloom[secure]'"
        )


def fresh_key() -> "X25519PrivateKey":
    """Return a new key for one agreement, from the system's randomness."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.generate()


def key_of(private: bytes) -> "X25519PrivateKey":
    """Return the key of its 32 bytes."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private)


def agreed(own: "X25519PrivateKey", other: bytes) -> bytes:
    """Return the 32 bytes that two keys agree on.

    Raises:
        ValueError: where the other public key is none, or would agree on nothing with everybody.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    try:
        return own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError as error:
        raise ValueError("a public key of a secure sum gives no shared key") from error


def derived(secret: bytes, *, salt: bytes, info: bytes, length: int = KEY_BYTES) -> bytes:
    """Return a key for one purpose, HKDF with SHA-256."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), length, salt, info).derive(secret)


def stream(key: bytes, length: int, *, start: bytes = bytes(16)) -> bytes:
    """Return the first bytes of ChaCha20's stream; `start` is counter and nonce, zeros as each key has one stream."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    return Cipher(ChaCha20(key, start), mode=None).encryptor().update(bytes(length))


def mask(key: bytes, size: int) -> "np.ndarray[Any, np.dtype[np.uint32]]":
    """Return (size,) uint32, uniform on all 32 bits, and so on any lowest ones."""
    return np.frombuffer(stream(key, 4 * size), dtype="<u4").astype(np.uint32, copy=False)


def sealed(key: bytes, text: bytes, *, about: bytes) -> bytes:
    """Return the text encrypted and authenticated, under a key that serves for nothing else."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key).encrypt(bytes(12), text, about)


def opened(key: bytes, box: bytes, *, about: bytes) -> bytes:
    """Return what was sealed.

    Raises:
        ValueError: where it was changed, or is another's.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), box, about)
    except InvalidTag as error:
        raise ValueError("a sealed share was changed on the way") from error


# --- who signs ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Signer:
    """The key of one client, which outlives all sums."""

    key: "EllipticCurvePrivateKey" = field(repr=False)

    @classmethod
    def fresh(cls) -> "Signer":
        """Return one of a new key."""
        from cryptography.hazmat.primitives.asymmetric import ec

        return cls(ec.generate_private_key(ec.SECP384R1()))

    @classmethod
    def read(cls, private: bytes) -> "Signer":
        """Return the one of a site's `node.key`.

        Raises:
            ValueError: where that is no key of an elliptic curve.
        """
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key

        try:
            key = load_ssh_private_key(private, None)
        # TypeError where it is under a password.
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, EllipticCurvePrivateKey):
            raise ValueError("a site's node.key must be what `fedloom keys add` made")
        return cls(key)

    @property
    def public(self) -> bytes:
        """Return the public key, as in a site's `node.pub`."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        return self.key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)

    def sign(self, text: bytes) -> bytes:
        """Return a signature."""
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
        from cryptography.hazmat.primitives.hashes import SHA384

        return self.key.sign(text, ECDSA(SHA384()))


@dataclass(frozen=True)
class Directory:
    """The public keys of those who may take part in a sum, by name."""

    public: Mapping[str, bytes]
    _sound: set[bytes] = field(default_factory=set, repr=False)
    """Hashes of what was found true: parties of one process look only once."""

    def check(self, name: str, text: bytes, signature: bytes) -> None:
        """Refuse a signature that is not of who it says.

        Raises:
            ValueError: with the name.
        """
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
        from cryptography.hazmat.primitives.hashes import SHA384
        from cryptography.hazmat.primitives.serialization import load_ssh_public_key

        if name not in self.public:
            raise ValueError(
                f"{name} would take part in the sum, whose key this site was not given: copy `peers` of the site's folder"
                " from the server's keys again"
            )
        seen = hashlib.sha256(repr((name, self.public[name], signature)).encode() + text).digest()
        if seen in self._sound:
            return
        try:
            key = load_ssh_public_key(self.public[name])
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, EllipticCurvePublicKey):
            raise ValueError(f"the public key of {name} is not one that `fedloom keys add` makes")
        try:
            key.verify(signature, text, ECDSA(SHA384()))
        except InvalidSignature as error:
            raise ValueError(f"a message in the name of {name} is not signed by its key") from error
        self._sound.add(seen)
