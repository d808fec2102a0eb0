"""chrF in every script, against sacrebleu 2.5."""

import pytest

from fedloom.evaluation.chrf import chrf

SACREBLEU = [
    ("The capital of Sweden is Stockholm.", "Stockholm is the capital.", 0.519097248),
    ("Die Hauptstadt ist Bern.", "Die hauptstadt war Berlin", 0.455331169),
    ("東京は日本の首都です。", "日本の首都は京都です。", 0.447083935),
    ("தமிழ் ஒரு மொழி", "தமிழ் மொழி", 0.41459478),
    ("العربية لغة", "لغة عربية جميلة", 0.392433041),
    ("మీరు ఎలా ఉన్నారు", "మీరు ఎక్కడ ఉన్నారు", 0.558114552),
    ("Straße", "Strasse", 0.362144956),
    ("aa", "ab", 0.25),
    ("12", "1200", 0.78125),
]
FIFTEEN = {
    "English": "How are you today?",
    "Dutch": "Hoe gaat het vandaag met je?",
    "Turkish": "Bugün nasılsın, İyi misin?",
    "Portuguese": "Como você está hoje?",
    "Spanish": "¿Cómo estás hoy?",
    "Filipino": "Kumusta ka ngayon?",
    "Bengali": "আজ তুমি কেমন আছো?",
    "Standard Malay": "Apa khabar hari ini?",
    "Lithuanian": "Kaip šiandien laikaisi?",
    "Tamil": "இன்று எப்படி இருக்கிறீர்கள்?",
    "Zulu": "Unjani namuhla?",
    "Irish": "Conas atá tú inniu?",
    "Nepali": "आज तिमीलाई कस्तो छ?",
    "Malayalam": "ഇന്ന് സുഖമാണോ?",
    "Telugu": "ఈరోజు ఎలా ఉన్నారు?",
}


@pytest.mark.parametrize(("reference", "text", "wanted"), SACREBLEU)
def test_scores_are_those_of_sacrebleu(reference: str, text: str, wanted: float):
    assert chrf(reference, text) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("text", FIFTEEN.values(), ids=FIFTEEN)
def test_a_text_scores_one_with_itself_in_fifteen_languages(text: str):
    """fedmllm C11: the reference's ROUGE is 0 where the script is not ASCII."""
    assert chrf(text, text) == pytest.approx(1)
    assert 0 <= chrf(text, text[::2]) < 1


@pytest.mark.parametrize(("a", "b"), [("", ""), ("", "x"), ("x", " "), ("x", "y")])
def test_nothing_in_common_is_zero(a: str, b: str):
    assert chrf(a, b) == 0


def test_spaces_do_not_count():
    assert chrf("abc", " a b\nc ") == pytest.approx(1)
