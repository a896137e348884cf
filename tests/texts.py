"""A tiny corpus in English and Chinese with emoji."""

import random
from pathlib import Path

ENGLISH = [
    *("the", "patient", "was", "given", "metformin", "for", "type", "two", "diabetes", "and", "hypertension", ","),
    *("then", "insulin", ";", "doctors", "followed", "up", "every", "three", "months"),
]
CHINESE = "患者服用二甲双胍治疗糖尿病和高血压医生随访三个月后血糖下降明显"


def make_lines(number: int, seed: int = 0) -> list[str]:
    """Lines of 1 to 60 words or characters, in either language, some with emoji."""
    draw = random.Random(seed)
    lines = []
    for _ in range(number):
        if draw.random() < 0.5:
            line = " ".join(draw.choices(ENGLISH, k=draw.randint(1, 60))).capitalize()
        else:
            line = "".join(draw.choices(CHINESE, k=draw.randint(1, 60))) + "。"
        lines.append(line + draw.choice(["", " 😀", " 👍🏽!"]))
    return lines


def write_text(folder: Path, train: int = 120, test: int = 40, seed: int = 1) -> Path:
    """A folder with train.txt and test.txt of so many lines; another seed makes other lines."""
    folder.mkdir()
    for name, lines in (("train", make_lines(train, seed)), ("test", make_lines(test, seed + 1))):
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder
