import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from fedloom.evaluation.evaluation_settings import Extract
from fedloom.evaluation.text_metrics import chrf, extract, normalise, paper_rouge, rouge, words

SENTENCES = {
    "English": "The weather is nice today, isn't it?",
    "Dutch": "Het is vandaag één graad warmer dan gisteren.",
    "Turkish": "İstanbul Türkiye'nin en büyük şehridir; ılık bir gün.",
    "Portuguese": "A maçã está em cima da mesa do avô.",
    "Spanish": "¿Dónde está el niño pequeño?",
    "Filipino": "Kumusta ka ngayong araw, kaibigan?",
    "Bengali": "আমি বাংলায় গান গাই।",
    "Malay": "Saya suka makan nasi lemak setiap pagi.",
    "Lithuanian": "Šiandien labai gražus oras Vilniuje.",
    "Tamil": "தமிழ் ஒரு பழமையான மொழி.",
    "Zulu": "Ngiyabonga kakhulu mngane wami.",
    "Irish": "Tá an aimsir go hálainn inniu.",
    "Nepali": "नेपाल एक सुन्दर देश हो।",
    "Malayalam": "മലയാളം കേരളത്തിലെ ഭാഷയാണ്.",
    "Telugu": "తెలుగు ఒక అందమైన భాష.",
    "Chinese": "今天天气很好。",
    "Japanese": "今日はいい天気です。",
    "Thai": "วันนี้อากาศดีมาก",
    "Arabic": "الطقس جميل اليوم.",
    "Korean": "오늘은 날씨가 좋아요.",
}
ascii_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)


@pytest.mark.parametrize("language", SENTENCES)
def test_a_text_agrees_with_itself_in_every_script(language: str) -> None:
    """The reference code scored 0 in Bengali, Tamil, Nepali, Malayalam and Telugu."""
    assert rouge(SENTENCES[language], SENTENCES[language]) == (1.0, 1.0)
    assert len(words(SENTENCES[language])) > 2


@pytest.mark.parametrize("language", SENTENCES)
def test_another_text_of_the_same_script_scores_less(language: str) -> None:
    text = SENTENCES[language]
    half = text[: len(text) // 2]
    assert 0 < rouge(text, half)[0] < 1


@given(ascii_text, ascii_text)
def test_rouge_agrees_with_googles_on_ascii(reference: str, text: str) -> None:
    theirs = RougeScorer(["rouge1", "rougeL"], use_stemmer=False).score(reference, text)
    wanted = (theirs["rouge1"].fmeasure, theirs["rougeL"].fmeasure)
    assert rouge(reference, text) == pytest.approx(wanted, abs=1e-12)


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_rouge_agrees_with_googles_on_repeated_words(a: list[str], b: list[str]) -> None:
    theirs = RougeScorer(["rougeL"], use_stemmer=False).score(" ".join(a), " ".join(b))
    assert rouge(" ".join(a), " ".join(b))[1] == pytest.approx(theirs["rougeL"].fmeasure, abs=1e-12)


WORDS = (
    "the",
    "The",
    "cat",
    "sat",
    "on",
    "mat.",
    "a",
    "b",
    "yes",
    ".",
    " . ",
    "..",
    "  ",
    "end. So",
)


def pairs() -> list[tuple[str, str]]:
    """Return 1,000 pairs of texts, of few words, so that they share many; `random()` alone is the same everywhere."""
    rng = random.Random(19)

    def text() -> str:
        return " ".join(
            WORDS[int(len(WORDS) * rng.random())] for _ in range(1 + int(20 * rng.random()))
        )

    return [(text(), text()) for _ in range(1000)]


def test_paper_rouge_is_that_of_rouge_1_0_1() -> None:
    """`Rouge().get_scores([text], [reference])[0]["rouge-l"]["f"]`, 0 where it raises."""
    file = Path(__file__).with_name("rouge_1_0_1.json")
    theirs = json.loads(file.read_text())
    assert len(theirs) == 1000
    ours = [paper_rouge(reference, text) for reference, text in pairs()]
    assert ours == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize(
    ("reference", "text", "score", "usual"),
    [
        ("the cat sat on the mat", "the cat is on the mat", 0.8, 0.8333),
        ("yes", "Yes", 0, 1),
        ("the the the the", "the cat", 0.6667, 0.3333),
    ],
)
def test_paper_rouge_is_not_the_usual_one(
    reference: str, text: str, score: float, usual: float
) -> None:
    """Sets of words, case-sensitive."""
    assert paper_rouge(reference, text) == pytest.approx(score, abs=1e-4)
    assert rouge(reference, text)[1] == pytest.approx(usual, abs=1e-4)


@pytest.mark.parametrize(("reference", "text"), [("a", ""), ("", "a"), ("a", "."), ("...", "a")])
def test_paper_rouge_of_nothing_is_zero(reference: str, text: str) -> None:
    assert paper_rouge(reference, text) == 0


def test_words_keep_marks_and_diacritics_together() -> None:
    assert words("Türkiye'nin") == ["türkiye", "nin"]
    assert words("நேபாளம் தமிழ்") == ["நேபாளம்", "தமிழ்"]
    assert words("天気x 12") == ["天", "気", "x", "12"]
    assert words("กินข้าว") == ["กิ", "น", "ข้", "า", "ว"]


def test_words_ignore_joiners_and_how_a_letter_is_composed() -> None:
    assert words("നന\u200dമ") == words("നനമ")
    assert words("e\u0301t\u00e9") == words("\u00e9te\u0301")
    assert words("\u0301 ") == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7", "7"),
        ("#### 1,234 apples, not 5", "1234"),
        ("The answer is 12.50 dollars, 3 each", "12.5"),
        ("the answer is: 3. The answer is 4.", "4"),
        ("it is $1,000,000.00", "1000000"),
        ("5-3", "3"),
        ("minus: -3", "-3"),
        ("\u22122", "-2"),
        ("-0", "0"),
        ("007", "7"),
        (".50", "0.5"),
        ("১২", "12"),
        ("3 and 5: the answer is eight", "5"),
        ("No number.", "no number"),
        ("1000000", "1000000"),
    ],
)
def test_numbers_are_found_and_spelt_one_way(text: str, number: str) -> None:
    assert extract(text, "number") == number


@pytest.mark.parametrize(
    ("what", "found"),
    [("text", "red. blue!"), ("first_line", "red"), ("last_line", "blue"), ("number", "red. blue")],
)
def test_the_wanted_part_of_a_text_is_compared(what: Extract, found: str) -> None:
    text = "\n Red. \n\nBLUE! \n"
    assert extract(text, what) == found.rstrip("!")


def test_normalising_hides_case_width_spaces_and_final_punctuation() -> None:
    assert normalise("  ＦＵＬＬ   Width\u3000!!! ") == "full width"
    assert normalise("STRASSE") == normalise("straße")
    assert normalise("?") == "?"
    assert normalise("ভালো।") == "ভালো"


def test_empty_text_has_no_score_and_no_parts() -> None:
    assert rouge("word", "") == (0.0, 0.0)
    assert extract("", "first_line") == ""


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
    """The reference's ROUGE is 0 where the script is not ASCII."""
    assert chrf(text, text) == pytest.approx(1)
    assert 0 <= chrf(text, text[::2]) < 1


@pytest.mark.parametrize(("a", "b"), [("", ""), ("", "x"), ("x", " "), ("x", "y")])
def test_nothing_in_common_is_zero(a: str, b: str):
    assert chrf(a, b) == 0


def test_spaces_do_not_count():
    assert chrf("abc", " a b\nc ") == pytest.approx(1)
