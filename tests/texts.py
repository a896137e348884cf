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


def write_text(folder: Path) -> Path:
    """A folder with train.txt of 120 lines and test.txt of 40."""
    folder.mkdir()
    for name, lines in (("train", make_lines(120, seed=1)), ("test", make_lines(40, seed=2))):
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder
