from fedloom.models.kinds import listed_groups


def test_groups_are_named_with_their_count():
    assert listed_groups(["a.1.q", "a.0.q", "b"]) == "a.*.q (2), b"
    assert listed_groups([f"{letter}.x" for letter in "abcdefgh"]).endswith("f.x and 2 more")
