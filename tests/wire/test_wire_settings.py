"""The recipe section `wire`."""

import pytest

from fedloom.wire.wire_settings import WireSettings


def test_defaults_are_lossless() -> None:
    settings = WireSettings()
    assert (settings.download, settings.upload, settings.compression) == (
        "float32",
        "float32",
        "none",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"download": "int2"}, r"wire\.download must be one of float32, .*int4, got 'int2'"),
        ({"upload": "fp16"}, r"wire\.upload must be one of .*, got 'fp16'"),
        ({"compression": "gzip"}, r"wire\.compression must be none or zstd, got 'gzip'"),
        ({"max_bytes": 0}, r"wire\.max_bytes must be at least 1, got 0"),
    ],
)
def test_refuses_what_no_message_can_be_written_with(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        WireSettings(**changes)  # type: ignore[arg-type]
