"""The number that an answer ends with, and the task that compares it."""

import pytest

from doralib.errors import DoraError
from doralib.evaluation.numbers import read_number
from doralib.evaluation.task_generated import NumberTask

CASES = {
    "The answer is 42": "42",
    "42.": "42",
    "So he has 42!": "42",
    "It is 3.50.": "3.5",
    "3.14.": "3.14",
    "007": "7",
    "-0": "0",
    "0.0": "0",
    ".5": "0.5",
    "It costs $.75": "0.75",
    "first 3, then 5, at last 7": "7",
    "10-3=7": "7",
    "5-7 apples": "7",
    "x = -5": "-5",
    "x=-5": "-5",
    "the change is \u221212.5 degrees": "-12.5",
    "(-8)": "-8",
    "+7": "7",
    "about ±3": "3",
    "$1,234.50": "1234.5",
    "-$5": "-5",
    "$-5": "-5",
    r"\$1{,}250": "1250",
    r"1\,250\,000": "1250000",
    "€ 99": "99",
    "£1,000,000": "1000000",
    "99 €": "99",
    "Rs. 500": "500",
    "Rs.500": "500",
    "USD 12.00": "12",
    "12 USD": "12",
    "1'234'567": "1234567",
    "1_000": "1000",
    "1\u00a0234": "1234",
    "1.234.567": "1234567",
    "1.234,56": "1234.56",
    "1,23,456": "123456",
    "1,2,3": "3",
    "In 2020 100 people": "100",
    "3/4": "0.75",
    "-3/4": "-0.75",
    "1/3 of it": "1/3",
    "2/6": "1/3",
    "1 1/2 cups": "1.5",
    "½": "0.5",
    "2½": "2.5",
    "3 ¼ pounds": "3.25",
    "24 / 8": "3",
    "1/0": "0",
    "on 12/25/2024": "2024",
    "50%": "50",
    "12.5 %": "12.5",
    r"50\%": "50",
    "1.2e3": "1200",
    "5E-2": "0.05",
    "1.2 x 10^3": "1200",
    "1.2 \u00d7 10³": "1200",
    r"6.02 \times 10^{2}": "602",
    r"3 \cdot 10^{-2}": "0.03",
    "10^6": "1000000",
    "2:3": "2:3",
    "The ratio is 4 : 6.": "4:6",
    "at 3:30 pm": "3:30",
    "Step 3: 42": "42",
    "Answer:5": "5",
    r"\boxed{42}": "42",
    r"\boxed{42} because 6 times 7": "42",
    r"first \boxed{1}, no: \boxed{\frac{7}{2}} (line 3)": "3.5",
    r"\boxed{\text{none}}, so 9": "9",
    r"\boxed{12 \text{ apples}}": "12",
    r"$\frac{3}{4}$": "0.75",
    r"\dfrac{10}{4}": "2.5",
    r"-\frac{1}{3}": "-1/3",
    r"\frac{-1}{3}": "-1/3",
    r"\frac34": "0.75",
    r"2\frac{1}{2}": "2.5",
    "25 cm^2": "25",
    "25 m²": "25",
    "9 litres of H2O": "9",
    "8 of x_1": "8",
    "the value of x2 is 6": "6",
    "90^\\circ": "90",
    "the 3rd": "3",
    "10km": "10",
    "#### 1,080": "1080",
    "<<4*5=20>>20": "20",
    "٤٢": "42",
    "\uff11\uff12\uff13": "123",
    "**17**": "17",
    "`8`": "8",
    "x=5\n": "5",
    "no number": "",
    "": "",
    "1e999999999": "1",
}


@pytest.mark.parametrize(("text", "number"), CASES.items())
def test_the_last_number(text, number):
    assert read_number(text) == number


def test_there_are_enough_cases():
    assert len(CASES) >= 60


@pytest.mark.parametrize(
    ("one", "other"),
    [("$1,200.50", "1200.5"), ("3/4", r"\boxed{\frac{6}{8}}"), ("1/2", "0.50"), ("2.0 : 3", "2:3"), ("5 %", "5")],
)
def test_equal_values_are_equal_texts(one, other):
    assert read_number(one) == read_number(other)


@pytest.mark.parametrize(("one", "other"), [("0.333", "1/3"), ("4:6", "2:3"), ("5", "-5"), ("0.05", "5%")])
def test_others_are_not(one, other):
    assert read_number(one) != read_number(other)


def test_long_texts_take_no_time():
    assert read_number("9" * 5000 + " and 3") == "3"
    assert read_number("1," * 20000 + "7") == "7"
    assert read_number("- " * 20000 + "1 1 1") == "1"


def test_the_task():
    task = NumberTask(name="t", data="d", prompt="{q}", answer="a")
    rows = [{"q": "How many?", "a": "2 + 3 = 5\n#### 1,005.0"}]
    (example,) = task.examples(rows)
    assert example.answer == "1005"
    assert task.predicted("That makes $1,005.") == example.answer
    assert task.predicted("none") == ""
    with pytest.raises(DoraError, match="1 of 2 rows have an answer that cannot be given: 'many'"):
        task.examples([*rows, {"q": "", "a": "many"}])
