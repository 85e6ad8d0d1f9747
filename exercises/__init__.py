"""The exercises of the lessons: what to write, how it is checked, and the mistakes that are known by name.

In a workbook, `check("02.one_head", one_head)` compares an answer with an independent oracle on inputs drawn afresh. A
wrong answer is compared with the known mistakes, and the one that gives the same numbers is named. The solutions are
the lessons' own cells; the files beside this one hold the rest, one for each lesson.
"""

from exercises.checking import Exercise, Mistake, check, course, exercises, verdict

__all__ = ["Exercise", "Mistake", "check", "course", "exercises", "verdict"]
