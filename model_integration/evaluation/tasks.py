"""What the evaluation asks: texts with something hidden in them, a question, and the one right answer.

All of it is text and numbers drawn from a seed: the same case gives the same prompt on every machine, whatever other
cases a run has. None of the tasks is a published benchmark. `niah` is needle retrieval in the style of
needle-in-a-haystack tests, `multikey` and `aggregation` are in the style of RULER's retrieval among several keys and
its common words, `whereabouts` in that of bAbI's questions with two supporting facts, hidden in running text; prompts,
haystack and scoring are this project's own, so figures do not compare with published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from model_integration.data import DataError, Document

#: Tasks whose answer stands at a depth of the text.
RETRIEVAL_TASKS = ("niah", "multikey")
TASKS = (*RETRIEVAL_TASKS, "whereabouts", "aggregation", "ppl")

#: Needles of a multikey text, the one that is asked for included.
MULTIKEY_NEEDLES = 8

#: People of a whereabouts text, and how often each of them goes to another of the places.
PEOPLE, MOVES = 4, 3
PLACES = ("attic", "bakery", "cellar", "garden", "kitchen", "library", "office", "stable")

#: Of the words of an aggregation text one in four is the answer; every other word comes twice.
ANSWER_SHARE = 4
WORDS_PER_LINE = 12

#: How far from its exact place a cut may move to fall between two lines, or at least between two words.
CUT_SLACK = 120

#: Tokenisations that the search for the longest fitting text may take.
FITTING_STEPS = 16

NEEDLE = "The magic number of {key} is {value}.\n"
RETRIEVAL_PROMPT = (
    "Magic numbers are hidden in the text below. Remember them: one is asked for at the end.\n\n"
    "{text}\n\nThe text above names the magic number of {key}. The magic number of {key} is"
)
WENT = "{person} went to the {place}.\n"
TOOK = "{person} took the {thing}.\n"
WHEREABOUTS_PROMPT = (
    "Hidden in the text below is where people went, and who took the {thing} along. Remember it.\n\n"
    "{text}\n\nThe text above tells in which place the {thing} is in the end. The {thing} is in the"
)
AGGREGATION_PROMPT = (
    "Below is a list of words. Remember which of them comes most often.\n\n"
    "{text}\n\nThe word that comes most often in the list above is"
)


@dataclass(frozen=True)
class Case:
    """One thing to evaluate: the `sample`-th text of a task at a length and, for retrieval, a depth in [0, 1]."""

    task: str
    length: int
    depth: float | None
    sample: int

    def random(self, seed: int) -> Random:
        """A generator that this case has for itself."""
        return Random(f"{seed}/{self.task}/{self.length}/{self.depth}/{self.sample}")


@dataclass(frozen=True)
class Prompt:
    """A text that ends where the answer has to follow; the answer starts with the space that separates them."""

    text: str
    answer: str


def make_cases(tasks: Iterable[str], lengths: Iterable[int], depths: Iterable[float], samples: int) -> list[Case]:
    """Every case of a run: short texts first, so that what fails at a length has shown what came before."""
    depths = list(depths)
    return [
        Case(task, length, depth, sample)
        for length in sorted(lengths)
        for task in tasks
        for depth in (depths if task in RETRIEVAL_TASKS else [None])
        for sample in range(samples)
    ]


class Haystack:
    """Running text, of which every case takes a stretch from a place of its own."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self.text = "\n".join(document.text for document in documents)

    def stretch(self, start: int, size: int) -> str:
        """About `size` characters from `start` on, cut between lines; the text goes on at its beginning."""
        if size > len(self.text):
            raise DataError(
                f"the haystack has {len(self.text):,} characters, too few for this length; give more (--data)"
            )
        start = cut_near(self.text, start)
        text = self.text[start : start + size]
        text += self.text[: size - len(text)]
        return text[: cut_near(text, size)]


def make_prompt(case: Case, seed: int, haystack: Haystack, count_tokens: Callable[[str], int]) -> Prompt:
    """The prompt of a case of any task but ppl, as long as fits into `case.length` tokens with its answer.

    Args:
        count_tokens: tokens of a text, those that the tokenizer puts around it included.

    Raises DataError when the length leaves no room, or the haystack is shorter than the length.
    """
    if case.task == "aggregation":
        build = _aggregation(case, seed)
    elif case.task == "whereabouts":
        build = _whereabouts(case, seed, haystack)
    else:
        build = _retrieval(case, seed, haystack)

    def tokens(size: int) -> int:
        prompt = build(size)
        return count_tokens(prompt.text + prompt.answer)

    return build(_largest_fitting(tokens, case))


def cut_near(text: str, at: int) -> int:
    """The last place at or before `at` where a line begins, or else a word, or else `at`.

    >>> cut_near("one two\\nthree four", 12), cut_near("one two three", 9), cut_near("one", 3)
    (8, 8, 3)
    """
    if at >= len(text):
        return len(text)
    nearest = max(0, at - CUT_SLACK)
    for separator in ("\n", " "):
        found = text.rfind(separator, nearest, at)
        if found >= 0:
            return found + 1
    return at


def insert_at_depths(text: str, lines: dict[str, float]) -> str:
    """`text` with each of `lines` put where a line begins near its depth: 0 is the beginning, 1 the end."""
    parts, done = [], 0
    for line, depth in sorted(lines.items(), key=lambda item: item[1]):
        at = max(done, cut_near(text, round(depth * len(text))))
        parts += [text[done:at], line if not at or text[at - 1] == "\n" else f"\n{line}"]
        done = at
    return "".join([*parts, text[done:]])


def make_word(random: Random) -> str:
    """A word of four syllables that no language has."""
    return "".join(random.choice("bdfgklmnprstvz") + random.choice("aeiou") for _ in range(4))


def _fresh(make: Callable[[], str], taken: str, others: Iterable[str]) -> str:
    """What `make` gives, drawn again until it stands neither in the text `taken` nor among `others`."""
    while (drawn := make()) in others or drawn in taken:
        pass
    return drawn


def _retrieval(case: Case, seed: int, haystack: Haystack) -> Callable[[int], Prompt]:
    assert case.depth is not None
    random = case.random(seed)
    start = random.randrange(max(len(haystack.text), 1))
    needles: dict[str, str] = {}
    for _ in range(MULTIKEY_NEEDLES if case.task == "multikey" else 1):
        key = _fresh(lambda: make_word(random).capitalize(), haystack.text, needles)
        needles[key] = _fresh(lambda: str(random.randrange(10**6, 10**7)), haystack.text, needles.values())
    asked = next(iter(needles))
    depths = {key: case.depth if key == asked else random.random() for key in needles}
    lines = {NEEDLE.format(key=key, value=value): depths[key] for key, value in needles.items()}

    def build(size: int) -> Prompt:
        text = insert_at_depths(haystack.stretch(start, size), lines)
        return Prompt(RETRIEVAL_PROMPT.format(text=text, key=asked), f" {needles[asked]}")

    return build


def _whereabouts(case: Case, seed: int, haystack: Haystack) -> Callable[[int], Prompt]:
    random = case.random(seed)
    start = random.randrange(max(len(haystack.text), 1))
    names: list[str] = []
    for _ in range(PEOPLE):
        names.append(_fresh(lambda: make_word(random).capitalize(), haystack.text, names))
    thing = _fresh(lambda: make_word(random), haystack.text, [])
    order = names * MOVES
    random.shuffle(order)
    routes = {name: random.sample(PLACES, MOVES) for name in names}  # no place twice, so no line twice
    moves = {name: iter(route) for name, route in routes.items()}
    lines = [WENT.format(person=name, place=next(moves[name])) for name in order]
    holder = names[0]
    last = len(order) - 1 - order[::-1].index(holder)
    lines.insert(random.randint(0, last), TOOK.format(person=holder, thing=thing))  # before the holder's last move
    depths = dict(zip(lines, sorted(random.random() for _ in lines), strict=True))

    def build(size: int) -> Prompt:
        text = insert_at_depths(haystack.stretch(start, size), depths)
        return Prompt(WHEREABOUTS_PROMPT.format(text=text, thing=thing), f" {routes[holder][-1]}")

    return build


def _aggregation(case: Case, seed: int) -> Callable[[int], Prompt]:
    def build(size: int) -> Prompt:
        random = case.random(seed)  # the list of another size is another list, so each starts from the seed
        answer = make_word(random)
        words = [answer] * max(3, size // ANSWER_SHARE)
        others: set[str] = {answer}
        while len(words) < size:
            others.add(word := _fresh(lambda: make_word(random), "", others))
            words += [word, word]
        random.shuffle(words)
        lines = (" ".join(words[i : i + WORDS_PER_LINE]) for i in range(0, len(words), WORDS_PER_LINE))
        return Prompt(AGGREGATION_PROMPT.format(text="\n".join(lines)), f" {answer}")

    return build


def _largest_fitting(tokens: Callable[[int], int], case: Case) -> int:
    """A size whose text has at most `case.length` tokens and, steps permitting, hardly fewer."""
    overhead = tokens(0)
    if overhead >= case.length:
        raise DataError(f"--lengths {case.length}: too short for --task {case.task}, which needs {overhead + 1} tokens")
    room = case.length - overhead
    fits, too_long = 0, None
    size = max(room // 8, 1)  # fewer than any text has: a list of words has several tokens in each
    for _ in range(FITTING_STEPS):
        used = tokens(size) - overhead
        if used <= room:
            fits = size
            if room - used <= case.length // 256:
                break
        else:
            too_long = size
        size = max(size * room // max(used, 1), fits + 1)
        if too_long is not None:
            size = min(size, too_long - 1)
        if size <= fits:
            break
    return fits
