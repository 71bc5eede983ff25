"""Answers compare by what they say: spelling does not count, signs, numbers and scripts do."""

import unicodedata

import numpy as np
import pytest

from unimed_jax.evaluate.closed import closed_accuracy
from unimed_jax.evaluate.metrics import text
from unimed_jax.evaluate.words import canonical, tokens

DECOMPOSED = unicodedata.normalize("NFD", "Viêm phổi thùy dưới phải")

# Two spellings of one answer: equal in every corrected score.
SAME = {
    "curly apostrophe": ("There isn’t any", "There isn't any"),
    "another apostrophe": ("the patientʼs lung", "the patient's lung"),
    "acute accent": ("the patient´s lung", "the patient's lung"),
    "curly quotes": ("“ground-glass” opacity", '"ground-glass" opacity'),
    "guillemets": ("«ground-glass» opacity", '"ground-glass" opacity'),
    "en dash": ("3–5 mm", "3-5 mm"),
    "hyphen of its own": ("T1‑weighted", "T1-weighted"),
    "minus sign": ("−3.5 HU", "-3.5 HU"),
    "plus of a number": ("+3.5", "3.5"),
    "thousands": ("1,000 mg", "1000 mg"),
    "millions": ("1,234,567.5", "1234567.5"),
    "Indian grouping": ("1,00,000", "100000"),
    "thousands by thin blanks": ("12\u202f500", "12500"),
    "thousands by apostrophes": ("1'000 mg", "1000 mg"),
    "thousands by curly apostrophes": ("1’234’567.5", "1234567.5"),
    "blank before per cent": ("50 %", "50%"),
    "decimal without zero": (".5 mg", "0.5 mg"),
    "less or equal": ("<= 5", "≤5"),
    "greater or equal": (">= 5 mm", "≥ 5 mm"),
    "blank after a comparison": ("<5 mm", "< 5 mm"),
    "plus or minus": ("5 +/- 2", "5 ± 2"),
    "times": ("3×4 cm", "3 x 4 cm"),
    "full-width digits": ("１０ｍｍ", "10mm"),
    "full-width thousands": ("１，０００", "1000"),
    "full-width punctuation": ("左肺，上叶！", "左肺,上叶"),
    "Chinese full stop": ("是。", "是"),
    "half-width katakana": ("ﾚﾝﾄｹﾞﾝ", "レントゲン"),
    "decomposed Hangul": (unicodedata.normalize("NFD", "폐렴"), "폐렴"),
    "decomposed Vietnamese": (DECOMPOSED, unicodedata.normalize("NFC", DECOMPOSED)),
    "Devanagari full stop and digits": ("५ मिमी।", "5 मिमी"),
    "Arabic digits and question mark": ("٣٫٥ سم؟", "3.5 سم"),
    "Arabic presentation forms": ("ﻻ", "لا"),
    "soft hyphen": ("pneumo\u00adthorax", "pneumothorax"),
    "zero-width blank": ("left\u200b lung", "left lung"),
    "micro sign": ("5 µm", "5 μm"),
    "superscript plus": ("Rh⁺", "Rh+"),
    "case and closing stop": (" Left\n lung. ", "left lung"),
}
# Two answers that differ: below 1 in every corrected score.
DIFFERENT = {
    "sign": ("-3.5", "3.5"),
    "minus sign": ("−3.5 HU", "3.5 HU"),
    "sign in brackets": ("(-3.5)", "(3.5)"),
    "less and greater": ("< 5 mm", "> 5 mm"),
    "less and less or equal": ("≤ 5", "< 5"),
    "comparison and none": ("< 5", "5"),
    "comparison of words": ("right > left", "right < left"),
    "tolerance": ("5 ± 2", "5 2"),
    "receptor": ("HER2+", "HER2-"),
    "receptor, set apart": ("HER2 (+)", "HER2 (-)"),
    "receptor, at the end": ("HER2 -", "HER2 +"),
    "receptor and none": ("HER2+", "HER2"),
    "one of two receptors": ("ER+/PR-", "ER+/PR+"),
    "blood group": ("Rh+", "Rh-"),
    "grade": ("3+", "3"),
    "only a sign": ("+", "-"),
    "abbreviated sign": ("-ve", "+ve"),
    "arrow": ("↑ T2", "↓ T2"),
    "per cent": ("5%", "5"),
    "decimal point": ("3.5", "35"),
    "leading point": (".5", "5"),
    "decimal comma": ("1,5", "15"),
    "decimal comma and point": ("1,5", "1.5"),
    "three decimals": ("0,123", "123"),
    "power": ("10²", "102"),
    "negative power": ("10⁻³", "10³"),
    "negative power and a range": ("10⁻³", "10-3"),
    "feet": ("5'10", "510"),
    "fraction": ("1½", "11/2"),
    "Thai vowels": ("ปี", "ปู"),
    "Thai tones": ("ข้าว", "ข่าว"),
    "Hindi vowels": ("दिल", "दल"),
    "Hindi marks": ("हंस", "हस"),
    "Arabic marks": ("كَتَبَ", "كُتِبَ"),
    "Vietnamese tones": (DECOMPOSED, unicodedata.normalize("NFD", "Viêm phổi thúy dưới phải")),
    "Chinese": ("左肺", "右肺"),
}
ONE_BY_ONE = (text.exact_match, text.token_f1)


@pytest.mark.parametrize("case", SAME)
def test_one_answer_spelled_in_two_ways_scores_as_equal(case):
    for prediction, reference in (SAME[case], SAME[case][::-1]):
        assert [score(prediction, reference) for score in ONE_BY_ONE] == [1, 1]
        assert text.token_recall(prediction, reference) == 1 == closed_accuracy(prediction, reference)


@pytest.mark.parametrize("case", DIFFERENT)
def test_different_answers_never_score_as_equal(case):
    for prediction, reference in (DIFFERENT[case], DIFFERENT[case][::-1]):
        assert all(score(prediction, reference) < 1 for score in ONE_BY_ONE)


@pytest.mark.parametrize(
    "sentence, expected",
    [
        ("3.5 cm, T1-weighted.", ["3.5", "cm", "t1", "weighted"]),
        ("< 5mm, HER2+", ["<5", "mm", "her2", "+"]),
        ("the C5-6 disc, 3-5 mm", ["the", "c5", "6", "disc", "3", "5", "mm"]),
        ("segments 1,2,3 of 2.5.1", ["segments", "1", "2", "3", "of", "2.5.1"]),
        ("don't; the patients' x-ray", ["don't", "the", "patients", "x", "ray"]),
        ("- a list, a dash - here", ["a", "list", "a", "dash", "here"]),
        ("ภาพปกติ ปี", ["ภาพปกติ", "ปี"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("左肺の CT 値は -50", ["左", "肺", "の", "ct", "値", "は", "-50"]),
        ("{<10><20><5><60>} <unk>", ["10", "20", "5", "60", "unk"]),
        ("", []),
        (" ?! …", []),
    ],
)
def test_words_numbers_and_signs(sentence, expected):
    assert tokens(sentence) == expected


def test_plain_words_are_split_at_blanks():
    """Seeded: for lower-case letters the tokens are those of `str.split`."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz  \t\n"), rng.integers(1, 60))
        assert tokens("".join(letters)) == "".join(letters).split()


def test_folding_twice_changes_nothing():
    """Seeded: a folded text is its own folded form, or two runs of one file could differ."""
    rng = np.random.default_rng(1)
    characters = list("aB3 .,+-<>='\"()½²−–’“１，。中ปีि\u0301\u200d\u00a0xX×/±%")
    for _ in range(500):
        drawn = "".join(rng.choice(characters, rng.integers(1, 12)))
        once = canonical(drawn)
        assert canonical(once) == once, ascii(drawn)


# ------------------------------------------------------------------------------ closed questions

CHOSEN = [
    ("Yes, no fracture is seen", "yes"),
    ("The answer is yes", "Yes."),
    ("No.", "no"),
    ("There is no fracture", "no"),
    ("no, yes would be wrong", "no"),
    ("on the left side", "left side"),
    ("No, the left one", "left"),
    ("Left, not right", "left"),
    ("the left rather than the right", "left"),
    ("It is in the left lung, with one or two nodules", "left lung"),
    ("a CT scan", "CT"),
    ("right or left", "right or left"),
    ("no fracture", "no fracture"),
    ("about 1,000 ml", "1000"),
    ("是的，没有骨折", "是"),
    ("没有骨折", "没有"),
    ("Yes. No pneumothorax, however", "yes"),
    ("no (not yes)", "no"),
    ("It is not. No.", "no"),
    ("5 mg/kg", "5 mg/kg"),
    ("the L4/5 disc", "L4/5"),
    ("non-contrast", "non-contrast"),
    ("negative for pneumonia", "negative"),
    ("左，不是右", "左"),
    ("仍然是左", "左"),
    ("还是正常", "正常"),
    ("正常或异常", "正常或异常"),
    ("有，没有骨折", "有"),
    # what is listed beside it is no other choice
    ("lung, right lower lobe", "lung"),
    ("CT, axial", "CT"),
    ("MRI, T2-weighted", "MRI"),
    ("T1, contrast-enhanced", "T1"),
    ("CT, computed tomography", "CT"),
    ("MRI (magnetic resonance imaging)", "MRI"),
    ("X-ray, chest X-ray", "X-ray"),
    ("lung, the lungs", "lung"),
    ("CT, not X-ray", "CT"),
    ("CT, no MRI", "CT"),
    ("Lung; heart and liver are of normal size", "lung"),
    ("the CT shows the liver, spleen", "CT"),
    ("lung and liver", "lung and liver"),
    ("T1, T2", "T1, T2"),
    ("a T2 FLAIR image", "FLAIR"),
    ("PET/CT", "PET/CT"),
    ("肝脏，肝", "肝"),
]
NOT_CHOSEN = [
    ("left or right", "left"),
    ("Right or left.", "left"),
    ("on the left side or the right side", "left"),
    ("left/right", "left"),
    ("left and right", "left"),
    ("Left, right", "left"),
    ("either CT or MRI", "MRI"),
    ("axial, coronal, sagittal", "axial"),
    ("liver or spleen", "liver"),
    ("yes or no", "yes"),
    ("yes/no", "no"),
    ("no or maybe yes", "no"),
    ("Yes and no", "yes"),
    ("No evidence of a mass, yes", "yes"),
    ("normal", "no"),
    ("abnormal", "normal"),
    ("not normal", "normal"),
    ("it isn't normal", "normal"),
    ("not on the left", "left"),
    ("no evidence of a mass", "mass"),
    ("side on the left", "left side"),
    ("-5", "5"),
    ("< 5", "5"),
    ("不是", "是"),
    ("是否", "是"),
    ("左右", "左"),
    ("yes, no", "yes"),
    ("Yes. No.", "yes"),
    ("yes|no", "yes"),
    ("yes & no", "no"),
    ("no\nyes", "no"),
    ("maybe yes, maybe no", "yes"),
    ("not yes", "yes"),
    ("not no", "no"),
    ("cannot be left", "left"),
    ("not seen on the left", "left"),
    ("unlikely left", "left"),
    ("non-contrast", "contrast"),
    ("none of them is normal", "normal"),
    ("absence of contrast", "contrast"),
    ("negative for pneumonia", "pneumonia"),
    ("liver|spleen", "liver"),
    ("T1/T2", "T2"),
    ("CT/3D", "CT"),
    ("不是左", "左"),
    ("没有结节", "结节"),
    ("未见明显结节", "结节"),
    ("是或不是", "是"),
    ("是还是不是", "是"),
    ("是不是", "是"),
    ("有没有", "有"),
    ("有或没有", "有"),
    ("正常或异常", "正常"),
    ("男或女", "男"),
    ("男、女", "男"),
    ("横断面还是冠状面", "横断面"),
    ("CT and X-ray", "CT"),
    ("CT, X-ray", "CT"),
    ("CT, X-ray", "X-ray"),
    ("Both a CT scan and an ultrasound.", "CT"),
    ("CT & radiograph", "CT"),
    ("CT and a chest X-ray", "CT"),
    ("CT and a chest X-ray", "X-ray"),
    ("T1, T2, FLAIR", "T1"),
    ("T1, T2, FLAIR", "FLAIR"),
    ("T1-weighted and T2-weighted images", "T1-weighted"),
    ("lung, liver, heart", "lung"),
    ("lung, liver, heart", "heart"),
    ("Lung. Liver.", "lung"),
    ("lung, liver, spleen, or heart", "lung"),
    ("the lungs and the heart", "lungs"),
    ("left kidney, spleen", "left kidney"),
    ("lung, liver, right lobe", "lung"),
    ("肺、肝、心脏", "肺"),
    ("肺和肝", "肝"),
    ("", "yes"),
    ("", ""),
]


@pytest.mark.parametrize("prediction, reference", CHOSEN)
def test_a_closed_answer_that_chooses_the_reference(prediction, reference):
    assert closed_accuracy(prediction, reference)


@pytest.mark.parametrize("prediction, reference", NOT_CHOSEN)
def test_a_closed_answer_that_does_not(prediction, reference):
    assert not closed_accuracy(prediction, reference)


# ------------------------------------------------------------------------------ BLEU


def corpus_bleu(pairs, order=4):
    return float(
        text.bleu(sum(text.bleu_sums(tokens(said), tokens(wanted)) for said, wanted in pairs), order)
    )


@pytest.mark.parametrize(
    "report", ["左肺上叶见结节影，边界清楚。", "正常", "肺に異常なし", "폐 정상", "normal", "ปกติ"]
)
def test_identical_reports_have_bleu_1(report):
    assert corpus_bleu([(report, report)]) == 1.0
    assert corpus_bleu([(report, report), ("a b c d e", "a b c d e")]) == 1.0


def test_chinese_reports_overlap_by_characters():
    assert text.token_f1("左肺上叶", "左肺下叶") == 0.75
    assert 0 < corpus_bleu([("左肺上叶见结节影", "左肺下叶见结节影")]) < 1
    assert corpus_bleu([("左肺上叶", "左肺下叶")], order=1) == 0.75


def test_orders_that_no_text_has_are_left_out_only_then():
    assert corpus_bleu([("a b c", "a b c")]) == 1.0
    assert corpus_bleu([("a b c d", "a b c")]) == 0.0  # no run of four is right
    assert corpus_bleu([("a b c", "a b c d")]) == 0.0  # none was said
    every = text.bleu(text.bleu_sums(["a", "b", "c"], ["a", "b", "c"]), every_order=True)
    assert every == 0.0  # as published


def test_bleu_equals_that_of_pycocoevalcap_on_random_reports():
    """Seeded: corpus BLEU-1..4 against an independent implementation, which adds 1e-9 to counts."""
    scorer = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    rng = np.random.default_rng(0)
    words = ["heart", "lung", "left", "right", "no", "effusion", "is", "seen"]
    for _ in range(20):
        wanted = [rng.choice(words, rng.integers(4, 30)) for _ in range(25)]
        changed = [
            np.where(rng.random(len(w)) < 0.2, rng.choice(words, len(w)), w)[rng.integers(3) :]
            for w in wanted
        ]
        pairs = [(" ".join(said), " ".join(w)) for said, w in zip(changed, wanted, strict=True)]
        said = {i: [pair[0]] for i, pair in enumerate(pairs)}
        wanted = {i: [pair[1]] for i, pair in enumerate(pairs)}
        theirs, _ = scorer.compute_score(wanted, said, verbose=0)
        assert [corpus_bleu(pairs, order) for order in (1, 2, 3, 4)] == pytest.approx(theirs, rel=1e-6)
