from pathlib import Path

import pytest

from fedloom.core.places import file_at, file_name, folder_at


def test_a_folder_may_be_there_or_not(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "a/b/c"):
        assert folder_at(path, "--out") == path
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_a_folder_cannot_be_made_of_or_in_a_file(below: str, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("")
    with pytest.raises(
        ValueError, match=r"--out must be a folder, got .*f, where .*f is a file|f/a"
    ):
        folder_at(file / below if below else file, "--out")


def test_a_file_needs_its_folder_and_its_ending(tmp_path: Path) -> None:
    assert file_at(tmp_path / "a.PNG", "--picture", ends=(".png",)) == tmp_path / "a.PNG"
    with pytest.raises(ValueError, match=r"--picture must be a file, got .*, which is a folder"):
        file_at(tmp_path, "--picture")
    with pytest.raises(
        ValueError, match=r"--picture must be in a folder that is there, got .*: make"
    ):
        file_at(tmp_path / "no/a.png", "--picture")
    with pytest.raises(ValueError, match=r"--picture must end in \.png or \.svg, got .*a\.gif"):
        file_at(tmp_path / "a.gif", "--picture", ends=(".png", ".svg"))


def test_a_name_stays_in_its_folder() -> None:
    assert file_name("../a\\b") == "..-a-b"
    assert file_name("xquad") == "xquad"
