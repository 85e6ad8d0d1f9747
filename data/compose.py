"""Compose the corpus, the instruction records and the fact list of the small written world.

Everything is drawn from two sources that were written by hand for this project: the fact
tables in ``data/facts/*.csv`` and the passages in ``data/passages/*.txt``.  The templates
and small grammars that turn them into text are in this file.  The composer is seeded: the
same seed gives the same bytes on every platform.

    python data/compose.py --seed 0 --out data

How the text is made:

* Each fact is put into a group.  "tuned" facts are in the corpus and are asked about in the
  instruction records, "pretrained" facts are in the corpus only, "absent" facts are nowhere.
* Facts are written in rounds.  In a round each known fact is mentioned exactly once, so all
  known facts are about equally frequent.  A round has one kind of document: articles, topic
  pages, lists, quizzes, lessons, mixed pages or comparisons.
* The phrasing of a fact moves on by one template each round.
* Around the facts there are the passages and small stories from a grammar.

Template notation: ``{S}`` is the subject with its article ("a dog", "Norway"), ``{s}`` the bare
subject, ``{P}`` its plural, ``{A}`` the answer with its article, ``{a}`` the bare answer, ``{B}``
its plural.  In the story grammar ``[x|y|z]`` means: choose one.  A line that begins with ``..``
belongs to the line above it.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SEPARATOR = "<|endoftext|>"
HELDOUT_SHARE = 0.08
PASSAGE_COPIES = 7
STORIES = 2000
# how often practice.txt repeats the facts of relations that are hard to learn
PRACTICE_ROUNDS = {"sum": 6, "material": 2}
TUNED_SHARE = 0.55
ABSENT_SHARE = 0.10

# ----------------------------------------------------------------------------------------
# Small helpers
# ----------------------------------------------------------------------------------------
VOWEL_SOUND = re.compile(r"\b([Aa]) (?=(?:\[)?[aeiouAEIOU](?!ni[cf]|s[eu]|ne\b|u))")
CHOICE = re.compile(r"\[([^\[\]]*)\]")


def words(text: str) -> list[str]:
    """Return the items of a text that are separated by commas."""
    return [item.strip() for item in text.split(",")]


def lines(text: str) -> list[str]:
    """Return the entries of a text block: its lines, with lines that begin with ".." joined on."""
    return [line.strip() for line in re.sub(r"\n\s*\.\. ", " ", text).splitlines() if line.strip()]


def table(text: str) -> list[tuple[str, ...]]:
    """Return the columns of a text block whose entries are ``left | right``."""
    return [tuple(part.strip() for part in line.split(" | ")) for line in lines(text)]


def ways(text: str) -> list[str]:
    """Return the variants of a text block, separated by " / " or line ends."""
    return [part.strip() for line in lines(text) for part in line.split(" / ")]


def cap(text: str) -> str:
    """Write the first letter of a text as a capital letter, after quotes if there are any."""
    start = 1 if text.startswith('"') else 0
    return text[:start] + text[start : start + 1].upper() + text[start + 1 :]


def sentence(text: str) -> str:
    """Make a full sentence of a raw phrase."""
    return cap(text) if text.endswith((".", "?", "!")) else cap(text) + "."


def fix_articles(text: str) -> str:
    """Write "an" in place of "a" before a vowel sound."""
    return VOWEL_SOUND.sub(r"\1n ", text)


def expand(text: str, rng: random.Random) -> str:
    """Resolve all choices ``[x|y]`` in a text, from the inside out."""
    while match := CHOICE.search(text):
        text = text[: match.start()] + rng.choice(match[1].split("|")) + text[match.end() :]
    return text


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences, roughly: at line ends and after . ? or !"""
    return [part for part in re.split(r"\n|(?<=[.?!])[\"']?\s+", text) if part.strip()]


class Deck:
    """Deals items in random order, and deals all of them before any comes again."""

    def __init__(self, items: Iterable, rng: random.Random) -> None:
        self.items, self.rng, self.left = list(items), rng, []

    def draw(self) -> Any:
        """Return the next item."""
        if not self.left:
            self.left = self.items[:]
            self.rng.shuffle(self.left)
        return self.left.pop()


# ----------------------------------------------------------------------------------------
# Relations: how each kind of fact is put into words
# ----------------------------------------------------------------------------------------
# [name] domain | heading
#   =  the canonical sentence (it ends with the answer)
#   +  another sentence with the subject first and the answer last
#   -  a sentence with the answer first, or with words after it
#   *  a sentence that says "it" instead of the subject (used inside articles only)
#   ?  a question (the first one is the canonical chat question)
#   ~  a question that is used in the instruction records only
#   !  a yes/no question
#   >  an instruction that takes the subject as its input
RELATION_TEXT = """
[capital] country | Countries and Their Capitals
= the capital of {S} is {A}
+ the capital city of {S} is {A}
+ the city that is the capital of {S} is {A}
+ in {S}, the capital is {A}
+ {S} has a capital called {A}
+ on a map of {S}, the capital is marked as {A}
+ when people talk about the capital of {S}, they mean {A}
- {A} is the capital of {S}
- {A} is the capital city of {S}
- the city of {A} is the capital of {S}
* its capital is {A}
* its capital city is {A}
? what is the capital of {S}
? which city is the capital of {S}
? what is the capital city of {S}
~ what is the name of the capital of {S}
~ can you tell me the capital of {S}
~ do you know the capital of {S}
! is {A} the capital of {S}
> What is the capital of this country?
> Name the capital city.

[continent] country | Countries and Their Continents
= {S} is a country in {A}
+ the country called {S} is in {A}
+ on a map of the world, you find {S} in {A}
+ the continent that {S} belongs to is {A}
+ {S} lies in {A}
+ people who travel to {S} go to {A}
- {A} is the continent where {S} lies
- one of the countries in {A} is {S}
- in {A} there is a country called {S}
* it is in {A}
* it lies in {A}
? on which continent is {S}
? which continent is {S} in
? where in the world is {S}
~ what continent does {S} belong to
~ tell me which continent {S} is in
! is {S} in {A}
> Which continent is this country in?
> Name the continent.

[language] country | Countries and Their Languages
= the main language of {S} is {A}
+ the language of most people in {S} is {A}
+ in {S}, most people speak {A}
+ people in {S} mostly speak {A}
+ children in {S} learn to read in {A}
+ most books in {S} are written in {A}
- {A} is the main language of {S}
- {A} is the language of most people in {S}
- you will hear {A} in the streets of {S}
* its main language is {A}
* most people there speak {A}
? what is the main language of {S}
? which language do people speak in {S}
? which language do most people in {S} speak
~ what do people speak in {S}
~ which language should I learn for a trip to {S}
! is {A} the main language of {S}
> Which language do people speak in this country?
> Name the main language.

[currency] country | Countries and Their Money
= the currency of {S} is the {a}
+ the money of {S} is called the {a}
+ in {S}, people pay with the {a}
+ the name of the money in {S} is the {a}
+ shops in {S} count their money in the {a}
- the {a} is the currency of {S}
- the {a} is the money that people use in {S}
- you need the {a} when you buy something in {S}
* its currency is the {a}
* people there pay with the {a}
? what is the currency of {S}
? what is the money of {S} called
? which money do people use in {S}
~ how do people pay in {S}
~ what kind of money do I need in {S}
! is the {a} the currency of {S}
> What is the currency of this country?
> Name the money people use in this country.

[kind] animal | Kinds of Animals
= {S} is a kind of {a}
+ {S} is {A}
+ every {s} is {A}
+ {S} belongs to the group of animals called {B}
+ {P} are {B}
+ we call {S} {A}
- one kind of {a} is the {s}
- among the {B} we find the {s}
- {A} that many people know is the {s}
* it is {A}
* it is one of the {B}
? what kind of animal is {S}
? to which group of animals does {S} belong
? what sort of animal is {S}
~ what type of animal is {S}
~ which group of animals does {S} belong to
! is {S} {A}
> What kind of animal is this?
> Which group of animals does it belong to?

[food] animal | What Animals Eat
= the main food of {S} is {a}
+ the thing that {S} mostly eats is {a}
+ {S} mostly eats {a}
+ {S} lives mainly on {a}
+ most of what {S} eats is {a}
+ {P} mostly eat {a}
+ {S} spends much of its day looking for {a}
- {a}: that is the main food of {S}
- you can see {S} eat {a} on most days
* its main food is {a}
* it mostly eats {a}
? what is the main food of {S}
? what does {S} mostly eat
? what does {S} mainly live on
~ what do {P} mostly eat
~ what does {S} like to eat
! is {a} the main food of {S}
> What does this animal mostly eat?
> Name the main food of this animal.

[home] animal | Animals and Their Homes
= the home of {S} is called {A}
+ the place where {S} lives is called {A}
+ when {S} is tired, it can rest in its {a}
+ the right word for the home of {S} is {a}
+ at night, {S} can rest in {A}
+ {S} lives in {A}
- {A} is the home of {S}
- {A} can be the home of {S}
- look into {A}, and you may find {S}
* its home is called {A}
* it lives in {A}
? what is the home of {S} called
? what do we call the home of {S}
? in what kind of home does {S} live
~ where does {S} live
~ what is the name for the home of {S}
! is the home of {S} called {A}
> What is the home of this animal called?
> Name the home of this animal.

[baby] animal | Animals and Their Babies
= a baby {s} is called {A}
+ the young of {S} is called {A}
+ the baby of {S} is {A}
+ a very young {s} is {A}
+ when {S} is still a baby, we call it {A}
+ the word for a young {s} is {a}
- {A} is a baby {s}
- {A} is the baby of {S}
- {A} grows up to be {S}
* its baby is called {A}
* its young is called {A}
? what is a baby {s} called
? what do we call a baby {s}
? what is the baby of {S} called
~ what is the name for the young of {S}
~ which name do we give to a baby {s}
! is a baby {s} called {A}
> What is the baby of this animal called?
> Name the baby of this animal.

[sound] animal | The Sounds of Animals
= the sound of {S} is called {A}
+ the noise that {S} makes is called {A}
+ the sound that {S} makes is {A}
+ when {S} makes its sound, we hear {A}
+ the word for the sound of {S} is {a}
+ from {S} you can hear {A}
- {A} is the sound of {S}
- {A} is the sound that {S} makes
- if you hear {A}, it may come from {S}
* its sound is called {A}
* the sound it makes is {A}
? what is the sound of {S} called
? what do we call the sound of {S}
? what sound does {S} make
~ which sound does {S} make
~ what noise does {S} make
! is the sound of {S} called {A}
> What is the sound of this animal called?
> Name the sound of this animal.

[legs] animal | How Many Legs
= the number of legs of {S} is {a}
+ if you count the legs of {S}, you get to {a}
+ count the legs of {S}, and the answer is {a}
+ ask how many legs {S} has, and the answer is {a}
+ to draw {S}, you must draw this number of legs: {a}
- {S} has {a} legs
- {P} have {a} legs
- each {s} has {a} legs
- {a} is the number of legs that {S} has
* the number of its legs is {a}
* it has {a} legs
? how many legs does {S} have
? what is the number of legs of {S}
? how many legs can you count on {S}
~ how many legs do {P} have
~ count the legs of {S}. How many are there
! does {S} have {a} legs
> How many legs does this animal have?
> Count the legs of this animal.

[class] thing | What Sort of Thing It Is
= {S} is a type of {a}
+ {S} is an example of {B}
+ if you sort things into groups, {S} goes with the {B}
+ {S} belongs to the group called {B}
+ my word book says that {S} is a type of {a}
+ we put {S} in the same group as other {B}
- one type of {a} is {S}
- among {B} there is also {S}
- when we talk about {B}, we can also name {S}
* it is a type of {a}
* it belongs to the group called {B}
? what type of thing is {S}
? to which group of things does {S} belong
? what sort of thing is {S}
~ which group does {S} belong to
~ how would you sort {S}
! is {S} a type of {a}
> What type of thing is this?
> Name the group that this thing belongs to.

[material] thing | What Things Are Made From
= {S} is made from {a}
+ to make {S}, people use {a}
+ the main thing you need to make {S} is {a}
+ the thing that {S} is mostly made from is {a}
+ before there is {S}, there is {a}
+ a factory that makes {s} needs {a}
- {a} can be turned into {S}
- people use {a} to make {S}
- we need {a} if we want to make {S}
* it is made from {a}
* the main thing in it is {a}
? what is {S} made from
? what do people need to make {S}
? what do people use to make {S}
~ from what is {S} made
~ what is the main thing in {S}
! is {S} made from {a}
> What is this made from?
> Name what people use to make this.

[opposite] word | Words and Their Opposites
= the opposite of {s} is {a}
+ the opposite of the word "{s}" is "{a}"
+ in the list of opposites, next to {s} stands {a}
+ the word that means the opposite of {s} is {a}
+ when you turn the word {s} around in meaning, you get {a}
+ {s} has an opposite, and it is {a}
- {a} is the opposite of {s}
- "{a}" and "{s}" are opposites
- the words "{s}" and "{a}" are opposites
* its opposite is {a}
? what is the opposite of {s}
? which word is the opposite of {s}
? which word means the opposite of {s}
~ tell me the opposite of {s}
~ give me the opposite of the word {s}
! is {a} the opposite of {s}
> What is the opposite of this word?
> Give the opposite.

[plural] word | One and Many
= the plural of {s} is {a}
+ the plural of the word "{s}" is "{a}"
+ we say one {s}, but two {a}
+ the word for more than one {s} is {a}
+ first there was one {s}, and then there were many {a}
+ the plural form of {s} is {a}
- "{a}" is the plural of "{s}"
- {a} is the plural of {s}
- we write {a} when there is more than one {s}
* its plural is {a}
? what is the plural of {s}
? what is the plural of the word {s}
? which word do we use for more than one {s}
~ how do you write more than one {s}
~ what do we call two of them: one {s}, two what
! is {a} the plural of {s}
> What is the plural of this word?
> Write the plural.

[color] thing | The Colors of Things
= the color of {S} is {a}
+ the usual color of {S} is {a}
+ if you paint a picture of {S}, you need {a}
+ in most pictures, {S} is {a}
+ if you look at {S}, the color you see is {a}
+ to draw {S}, take a pencil that is {a}
- {a} is the color of {S}
- you see something {a} when you look at {S}
- we think of {a} when we think of {S}
* its color is {a}
? what is the color of {S}
? what color is {S}
? which color does {S} have
~ tell me the color of {S}
~ which color should I use to paint {S}
! is the color of {S} {a}
> What is the color of this?
> Name the usual color of this thing.

[next] time | Days, Months and Seasons
= the {unit} after {s} is {a}
+ the {unit} that comes after {s} is {a}
+ after {s} comes {a}
+ when {s} is over, the next {unit} is {a}
+ {s} ends, and then begins {a}
+ if this {unit} is {s}, the next {unit} is {a}
- {a} is the {unit} after {s}
- {a} is the {unit} that comes after {s}
- {a} comes after {s}
* the {unit} after it is {a}
? which {unit} comes after {s}
? what is the {unit} after {s}
? what comes after {s}
~ which {unit} is next after {s}
~ tell me the {unit} that follows {s}
! is {a} the {unit} after {s}
> What comes next after this?
> Name what follows.

[sides] thing | Shapes and Their Sides
= the number of sides of {S} is {a}
+ if you count the sides of {S}, you get to {a}
+ count the sides of {S}, and the answer is {a}
+ to draw the sides of {S}, you need this number of lines: {a}
- {S} has {a} sides
- {S} is a shape with {a} sides
- every {s} has {a} sides
- {a} is the number of sides that {S} has
* the number of its sides is {a}
? how many sides does {S} have
? what is the number of sides of {S}
? how many sides can you count on {S}
~ tell me how many sides {S} has
! does {S} have {a} sides
> How many sides does this shape have?
> Count the sides of this shape.

[use] thing | Useful Things
= {S} is used to {a}
+ people use {S} to {a}
+ you can use {S} to {a}
+ we need {S} when we want to {a}
+ with {S}, you can {a}
+ {S} is a thing that helps you {a}
- if you want to {a}, take {S}
- to {a}, people use {S}
- someone who wants to {a} needs {S}
* it is used to {a}
* you can use it to {a}
? what is {S} used for
? what do people use {S} for
? what can you do with {S}
~ why do people need {S}
~ what is the use of {S}
! is {S} used to {a}
> What is this thing used for?
> Tell me the use of this thing.

[job] person | Jobs and Work
= the job of {S} is to {a}
+ the work of {S} is to {a}
+ every day, {S} goes to work to {a}
+ {S} is a person who learned to {a}
+ we pay {S} to {a}
+ what {S} does at work is to {a}
- to {a} is the job of {S}
- someone whose job is to {a} is called {S}
- a person who works to {a} is called {S}
* the job is to {a}
? what does {S} do
? what is the job of {S}
? what does {S} do at work
~ what is the work of {S}
~ tell me about the job of {S}. What is it
! is it the job of {S} to {a}
> What does this person do at work?
> Tell me what this person's job is.

[workplace] person | Where People Work
= {S} works {preposition} {A}
+ {S} does most of the work {preposition} {A}
+ the usual workplace of {S} is {A}
+ in the morning, {S} goes to work {preposition} {A}
+ you will often find {S} {preposition} {A}
+ the place where {S} works is {A}
- {A} is the usual workplace of {S}
- {A} is a place where {S} works
- you need {A} if you want to work as {S}
* the usual workplace is {A}
? where does {S} work
? what is the workplace of {S}
? in what place does {S} work
~ where would I find {S} at work
~ tell me where {S} works
! does {S} work {preposition} {A}
> Where does this person work?
> Name the workplace of this person.

[sum] number | Adding Small Numbers
= {first} plus {second} is {a}
+ {first} and {second} make {a}
+ if you add {first} and {second}, you get {a}
+ the sum of {first} and {second} is {a}
+ take {first}, add {second}, and you have {a}
+ {digits}
+ {second} plus {first} is {a}
- {a} is {first} plus {second}
- {a} is the sum of {first} and {second}
* together they make {a}
? what is {first} plus {second}
? how much is {first} plus {second}
? what do {first} and {second} make together
~ what is {digits_question}
~ add {first} and {second}. What do you get
~ how much is {second} plus {first}
! is {first} plus {second} {a}
> Add the two numbers.
> What is the sum?
"""

# Relations without absent facts: their answers follow from an order, a count or a pattern.
NO_ABSENT = ("legs", "next", "sides", "sum")
# Relations where a wrong answer drawn from the table is surely wrong.
SAFE_WRONG = words(
    "capital, continent, language, currency, kind, legs, class, opposite, plural, next, sides, sum"
)

# ----------------------------------------------------------------------------------------
# Sentences around the facts
# ----------------------------------------------------------------------------------------
FILLERS = {
    "country": """
        Many people like to visit {S}.
        {S} has its own flag and its own songs.
        Children in {S} go to school, play games, and help at home.
        There are towns, fields, and roads in {S}.
        People in {S} have their own food and their own holidays.
        You can find {S} on any good map of the world.
        Some people were born in {S}, and others moved there later.
        A letter to {S} needs a stamp and a few days.
        Every country has a story, and {S} is no exception.""",
    "animal": """
        There is a lot to learn about {S}.
        If you see {S}, stay quiet and watch.
        Like all animals, {S} needs food, water, and rest.
        Many children's books tell a story about {S}.
        It is not hard to draw {S} if you take your time.
        A child who loves animals will ask many questions about {S}.
        Some animals are big and some are small, and each one lives in its own way.""",
    "thing": """
        Most people know {S} from daily life.
        It is easy to forget how useful small things are.
        Look around you, and you will see many things like this.
        Somebody had to find out about this first.
        A good way to learn about {S} is to look at it closely.
        Ask an older person about {S}, and you will hear a story.""",
    "person": """
        Every town needs people who do their work well.
        It takes time to learn the work of {S}.
        Some children want to be {S} when they grow up.
        The day of {S} can be long, but the work is important.
        {S} has to be careful and patient.""",
    "word": """
        Words are easier to learn in pairs.
        Say the word aloud and then write it down.
        A good reader knows many words.
        You can learn a few words every day.""",
    "number": """
        Adding is easy if you use your fingers.
        Numbers are the same in every country.
        You can check the answer by counting.
        Small sums are a good exercise for the morning.""",
    "time": """
        Time never stops.
        A calendar helps us to know the date.
        Every part of the year has something good.
        Children learn the order by heart.""",
}

PAGE_OPENINGS = """
    Here are some facts worth knowing.
    This page is short, but it is full of facts.
    Read this page slowly and try to remember it.
    A teacher wrote these lines on the board.
    These lines are from a school book.
    It is good to know these things by heart.
    Let us look at a few examples.
    Some of this you may know already.
    We begin with an easy one.
    Today we learn something new."""

PAGE_ENDINGS = """
    That is enough for today.
    Now close the book and say it again.
    Tomorrow we will learn more.
    There is always more to learn.
    Can you remember all of it?
    Now you know a little more than before.
    Read it once more, and then go out and play."""

MIXED_TITLES = """
    Did You Know?
    Things Worth Knowing
    A Page of Facts
    Notes from a School Book
    This and That
    Small Facts for a Rainy Day
    From My Notebook
    What We Learned This Week
    Facts to Remember
    A Little of Everything"""

TRUTH_FRAMES = """
    {raw}.
    {raw}.
    {raw}.
    Did you know that {raw}?
    It is true that {raw}.
    Everybody should know that {raw}.
    In school we learn that {raw}.
    My book says that {raw}.
    Remember that {raw}.
    {name} told me that {raw}.
    As we know, {raw}."""

QUIZ_TITLES = """
    A Quiz
    A Short Quiz
    Questions and Answers
    Test Yourself
    The Friday Quiz
    Ten Minutes of Questions
    A Quiz for the Family"""

LESSON_TITLES = """
    At the Kitchen Table
    A Lesson with {teacher}
    On the Way to School
    {pupil} Learns Something New
    Questions After Dinner
    A Game of Questions
    {teacher} Asks {pupil}
    On the Train
    In the Garden
    Before the Test"""

LESSON_OPENINGS = """
    {teacher}: Are you ready, {pupil}?/{pupil}: Yes, I am ready.
    {pupil}: Can you ask me some questions?/{teacher}: Of course. Listen well.
    {teacher}: Let us play a game. I ask, and you answer./{pupil}: That sounds like fun.
    {pupil}: There is a test tomorrow. Please help me./{teacher}: Good. Let us begin.
    {teacher}: What did you learn at school today?/{pupil}: A lot. Ask me something!
    {pupil}: I have read the whole page./{teacher}: Then you will know the answers."""

LESSON_ENDINGS = """
    {teacher}: Very good. You know a lot./{pupil}: Thank you!
    {teacher}: All your answers were right./{pupil}: I learned them by heart.
    {teacher}: That is enough for today./{pupil}: Can we play again tomorrow?
    {teacher}: Well done, {pupil}./{pupil}: Now it is my turn to ask you.
    {teacher}: Was it hard?/{pupil}: No, it was easy. Please ask harder ones tomorrow."""

PRAISE = """
    Right.
    That is right.
    Good.
    Very good.
    Yes, that is correct.
    Well done.
    Exactly."""

SCENE_TEXT = """
{teacher} looked at {pupil} and asked, "{question}?" {pupil} thought for a moment. "{answer},"
.. {he} said.
"{question}?" asked {teacher}. {pupil} knew the answer at once. "{answer}," {he} said.
Then {teacher} asked, "{question}?" "{answer}," said {pupil} with a smile.
The next question was a little harder. "{question}?" {pupil} looked out of the window and then
.. said, "{answer}."
{pupil} read from the book: "{answer}." {teacher} nodded.
"{question}?" said {teacher}. "I know that one," said {pupil}. "{answer}."
"I have a question," said {pupil}. "{question}?" {teacher} smiled and answered, "{answer}."
{pupil} wrote a line in {his} notebook: {answer}.
"""

SCENE_OPENINGS = """
    It was a rainy afternoon, and {pupil} sat at the table with {teacher}.
    {pupil} had a test the next day, so {teacher} helped {him} to learn.
    On the long train ride, {teacher} and {pupil} played a game of questions.
    After dinner, {teacher} took an old book from the shelf and called {pupil}.
    {pupil} was walking home with {teacher}, and they talked all the way.
    The classroom was quiet. {teacher} stood in front of the board and called {pupil}.
    {pupil} could not sleep, so {teacher} sat down next to the bed with a big book."""

SCENE_ENDINGS = """
    "You are a good learner," said {teacher}.
    {pupil} was proud and told everybody about it at dinner.
    Then they closed the book and had some tea.
    "That is enough for today," said {teacher}, and they went outside.
    {pupil} wanted to hear more, but it was time for bed.
    In the end, both of them had learned something."""

GIRLS = words(
    "Anna, Mia, Clara, Ella, Nora, Lucy, Rosa, Emma, Lena, Ida, Sara, Julia, Vera, "
    "Alice, Maya, Hanna"
)
BOYS = words(
    "Ben, Tom, Leo, Max, Sam, Paul, Jack, Finn, Oscar, Karl, Tim, Adam, Noah, Hugo, Peter, Ali"
)
TEACHERS = """
    her|Mrs Green
    him|Mr Brown
    her|Grandmother
    him|Grandfather
    her|Aunt Rose
    him|Uncle Fred
    her|Mrs Hill
    him|Mr Wood"""

# ----------------------------------------------------------------------------------------
# A small grammar of stories: "title | sentences", with [x|y|z] for a choice
# ----------------------------------------------------------------------------------------
# {n} main person, {he} {him} {his}; {m} second person, {mhe} {mhim} {mhis}; {pet} {place}
# {lost} {gift} {dish} {craft} {weather} {adult}
STORY_SLOTS = {
    "pet": words("dog, cat, rabbit, puppy, kitten, pony, hen, duck, parrot, hamster, goat"),
    "wild": words("fox, hedgehog, squirrel, crow, hare, mouse, frog, robin, deer, owl"),
    "place": words(
        "park, forest, market, river, beach, old bridge, school, garden, village square, lake"
    ),
    "lost": words(
        "red hat, key, blue scarf, book, ball, ring, umbrella, left shoe, bag, toy boat, letter"
    ),
    "gift": words(
        "drum, kite, book, pair of boots, watch, paint box, small lamp, warm coat, music box"
    ),
    "dish": words(
        "soup, apple pie, bread, pancakes, a salad, rice pudding, a cake, fish and potatoes"
    ),
    "craft": words(
        "kite, bird house, paper boat, wooden chair, little bridge, snowman, tree house"
    ),
    "fruit": words("apples, pears, plums, cherries, grapes, nuts, berries"),
    "adult": words("mother, father, grandmother, grandfather, aunt, uncle"),
    "part": words("kitchen, cellar, hall, garden, attic"),
}

STORY_OPENINGS = """
    It was a [cold|warm|bright|gray|windy|quiet|fine|rainy] [morning|day].
    One [cold|quiet|cloudy|fine] [day|morning], {n} [felt bored|wanted to do something
    .. new|was in a good mood].
    {n} lived in a [small|white|yellow|little old|tall] house near the {place}.
    {n} woke up [early|late] and looked out of the window.
    On [Saturday|Sunday|Friday|the first day of the holidays], {n} had [nothing to do|a lot of
    .. time].
    There was once a [girl_boy] called {n} who lived near the {place}.
    Everybody in the [village|street|school] knew {n}.
    Last [week|month|year], something [strange|funny|nice|small] happened to {n}.
    This is a [short|small|true|funny] story about {n}.
    {n} and {m} were [good|old|the best of] friends."""

STORY_ENDINGS = """
    [That evening|That night], {n} [slept well|told the whole story to {his} {adult}|was tired
    .. but happy].
    {n} never forgot that day.
    {n} [still thinks|often thinks] of that day.
    It had been a [good|long|good and long] day.
    And so the day ended [well|with a smile|with a cup of hot tea|with a good meal].
    {n} learned that [a little help goes a long way|two can do more than one].
    After that, {n} and {m} [met every week|talked about it for a long time|were better friends
    .. than before].
    When {he} got home, {his} {adult} was waiting with [warm soup|a blanket|a big smile|a
    .. hundred questions]."""

# The flags say what may be added: "o" an opening, "e" an ending.
STORY_TEXT = """
The Lost {lost_t} | oe | {n} could not find {his} {lost}. {he_c} looked [under the bed|behind
.. the door|on the shelf] and [in the garden|in every room|on the stairs], but it was not there.
.. {n} was [sad|worried|close to tears]. "Where did you see it last?" asked {m}. {n} thought
.. [hard|for a moment]. "I had it [at the {place}|when I came home|before breakfast]," {he} said.
.. They went to look together. [There it was, [under a bench|next to the gate|between two
.. stones]!|And there was the {lost}, [safe and dry|a little wet but not broken].] {n} [thanked
.. {m}|was so happy that {he} jumped|hugged {m}].
The Little {wild_t} | oe | Near the path {n} saw a little {wild}. It did not [run away|move],
.. because one of its legs was [hurt|caught in some wire]. {n} was [careful|very quiet] and came
.. closer. "Do not be afraid," {he} [said|whispered]. {he_c} [gave it some water|put it in a box
.. with dry grass|helped it with both hands]. {m} brought [some food|an old towel|a warm cloth].
.. After [two days|a week|three days], the {wild} could [walk|move] again. They took it back to the
.. {place} and [watched it go|waved goodbye]. [The {wild} looked back once.|Then it was gone.]
A New Friend | o | A new child came to {n}'s class. The child was called {m} and [knew
.. nobody|did not say a word]. In the break, {m} stood alone [by the wall|under a tree|at the
.. window]. {n} [thought about it|remembered {his} own first day] and went over. "Do you want to
.. [play ball|share my apple|see the garden] with me?" {he} asked. {m} [smiled|nodded]. They
.. [talked and played|ran and laughed] until the bell rang. The next day, {m} was waiting for {n}
.. [at the gate|on the steps]. Now neither of them was alone.
Cooking {dish_t} | oe | {n} wanted to make {dish} for {his} {adult}. {he_c} [read the recipe
.. twice|asked {m} for help|put everything on the table]. First {he} washed {his} hands. Then {he}
.. [mixed|measured|cut] everything that was needed. It was [harder|easier] than {he} had thought.
.. Soon the kitchen [smelled good|was warm|was full of steam]. [A little of it was burnt, but
.. nobody minded.|It looked just like the picture in the book.] When {his} {adult} came home, the
.. table was [set|ready]. "I have not eaten anything so good for a long time," said {his}
.. {adult}. {n} was
.. proud.
The {gift_t} | oe | {n} wanted to give {m} a present, but {he} had only [a few coins|very little
.. money]. In a shop window {he} saw a {gift}. It was [too expensive|more than {he} could pay]. So
.. {n} [worked in a garden|helped an old neighbor|sold lemonade|carried bags at the market] for
.. [two weeks|a month|ten days]. At last {he} had enough money and went back to the shop. The
.. {gift} was still there. {n} [bought it|paid for it] and [wrapped it in blue paper|tied a ribbon
.. around it]. When {m} opened it, {mhe} [could not speak|laughed with joy|said that {n} was a
.. true friend].
The {craft_t} | oe | {n} and {m} wanted to build a {craft}. They [made a plan|drew a picture]
.. and looked for [wood and string|everything they needed]. At first nothing worked. [A part
.. broke.|It fell over.|The wind was too strong.] {m} wanted to [stop|give up], but {n} said, "Let
.. us try [once more|another way]." They [started again|worked slowly this time|asked an old man
.. for advice]. In the [evening|afternoon] it was finished. It was not perfect, but it was theirs.
.. Everybody who passed by [stopped to look|said something nice].
The Storm | e | Dark clouds came over the {place}. {n} and {m} were [far from home|out on a
.. walk], and it began to rain. Then there was [thunder|a loud noise in the sky]. "We must not
.. stand under a tall tree," said {m}. They ran to [an old barn|a small hut|a farm house]. An old
.. woman opened the door. "Come in, you are wet," she said. She gave them [dry towels|hot tea|bread
.. and soup], and they waited. After an hour the sky was clear again. {n} and {m} thanked her and
.. [walked|ran] home [through the wet grass|over the hill].
The Race | - | Every year there was a race near the {place}. {n} was not the fastest, but {he}
.. [practiced every day|wanted to try]. {m} was [very fast|sure of winning]. On the day of the
.. race, {m} took the lead. But near the end {m} [fell|hurt a foot|tripped over a stone]. {n} could
.. have run past, but {he} stopped and [helped {m} up|gave {mhim} a hand]. They crossed the line
.. together, and they were [last|not among the first three]. But the people clapped [for a long
.. time|louder than before]. "You could have won," said {m}. "I did," said {n}.
{n} and the {pet_t} | o | {n} had a {pet} that [liked to hide|was always hungry|was afraid of
.. the rain]. One day the {pet} was gone. The gate was open, and {n} knew that {he} had [forgotten
.. to close it|left it open]. {he_c} called and called. {m} helped to look [along the road|at the
.. {place}|behind the houses]. Then they heard a small sound from [an empty box|under a bush|the
.. shed]. The {pet} was inside and could not get out. {n} took it in {his} arms and carried it
.. home. After that {he} always closed the gate.
The Broken Cup | oe | {n} was playing in the {part} with a ball, and {he} broke a cup. It was
.. the [old|favorite] cup of {his} {adult}. {n} was [afraid|ashamed]. First {he} wanted to [hide
.. the pieces|say nothing|blame the cat]. But {he} could not [eat|think of anything else]. In the
.. evening {n} told the truth. {his_c} {adult} was quiet for a moment and then said, "Thank you for
.. telling me. A cup is only a cup." Together they [picked up the pieces|glued it together]. {n}
.. felt [light|much better] again.
Picking {fruit_t} | e | In autumn there was a lot of work in the garden. {n} and {m} were asked
.. to pick {fruit}. {n} [climbed the ladder|worked fast], and {m} held the basket. They [sang|told
.. jokes] while they worked. When the first basket was full, they [sat down in the grass|took a
.. break] and ate some. "The best {fruit} are always at the top," said {n}. In the evening they had
.. [five|six|seven] full baskets. The neighbor gave them [a bag of {fruit}|some coins|a big jar of
.. jam] as thanks. They shared it [fairly|in two equal parts].
The Old Clock | o | In the {part} there was an old clock that had not worked for years. {n}
.. [looked at it every day|wanted to know why]. "Time has stopped in there," said {his} {adult}.
.. One rainy day, {n} opened the little door at the back. Inside there was [dust|a small key|a dead
.. leaf]. {n} cleaned it [with a soft brush|slowly and carefully]. Then {he} turned the key, and
.. the clock began to tick. Everybody in the house [came to listen|stopped talking]. Since then,
.. {n} turns the key every Sunday.
The Letter | oe | A letter came for {n}. There was no name on the back, only [a drawing of a
.. boat|a blue stamp|three small stars]. {n} opened it [at once|with care]. Inside was [a map|a
.. short poem|a photo of the {place}] and the words: "Come on Saturday at three." {n} [was
.. curious|showed it to {m}]. On Saturday {he} went to the {place}. There stood {m} with [a cake|a
.. picnic basket|two kites]. "I wanted it to be a surprise," said {m}. They [laughed|stayed until
.. it was dark].
A Walk at Night | - | {n} was a little afraid of the dark. {his_c} {adult} took a lamp and said,
.. "Come with me." They walked slowly to the {place}. "What do you hear?" asked {his} {adult}. {n}
.. heard [the wind in the trees|the water|a {wild}]. "What do you see?" {n} saw [the moon|a hundred
.. stars|the lights of the village]. "The night is full of things," said {his} {adult}. "You only
.. need to look and listen." On the way back, {n} carried the lamp, and {he} was not afraid any
.. more.
The Seed | - | {n} put a seed into a pot with earth. {he_c} gave it water and set it [on the
.. windowsill|in the sun]. The next day {he} looked, but nothing had happened. After a week there
.. was still nothing. "It is [dead|a bad seed]," said {n}. "Wait," said {his} {adult}. So {n}
.. waited and gave it water [every morning|every second day]. After two weeks a small green tip
.. came out of the earth. {n} [called the whole family|danced around the room]. In summer the plant
.. was as tall as {n}.
The Market | oe | {n} went to the market to buy {fruit} and bread. There were [many people|many
.. stands], and it was loud. {n} saw a [juggler|man with a violin|woman with balloons] and stopped
.. to watch. When {he} reached for {his} purse, it was gone. {n} went back the same way and looked
.. at the ground. Then {m} came running. "You dropped this at the [bread|cheese|flower] stand,"
.. said {m}, and held up the purse. Nothing was missing. {n} bought [two rolls|a bag of {fruit}]
.. and gave {m} half of it.
The {wild_t} and the {wild2_t} | - | A {wild} and a {wild2} lived near the same {place}. The
.. {wild} worked all [day|summer] to collect food. The {wild2} only wanted to [play|sleep in the
.. sun|sing]. "Winter is coming," said the {wild}. "Winter is far away," said the {wild2}. Then the
.. snow came, and the {wild2} had nothing to eat. It was [cold and hungry|too proud to ask]. The
.. {wild} opened its door and said, "Come in. There is enough for two. But next year you will help
.. me." And the next year the {wild2} did.
The Proud {wild_t} | - | There was once a {wild} that thought it was the [cleverest|fastest|most
.. beautiful] animal of all. It told everybody so, every day. The other animals [were tired of
.. it|walked away]. One day the {wild} fell into a [hole|deep ditch] and could not get out. It
.. called for help. A small {wild2} heard it and [brought a long branch|called the others].
.. Together they pulled the {wild} out. "Why did you help me?" it asked. "Because you needed help,"
.. said the {wild2}. The {wild} was quiet for a long time. Then it said, "Thank you."
Going to School | - | In the morning {n} got up at [six|seven|half past seven]. {he_c} washed
.. {his} face and [brushed {his} teeth|combed {his} hair]. For breakfast there was [bread with
.. jam|warm porridge|an egg and some tea]. Then {n} put on {his} [coat|jacket] and took {his} bag.
.. On the way to school {he} met {m}. They talked about [the test|the weather|a book|the holidays].
.. The first lesson was [music|reading|sport|drawing], and {n} liked it. At noon they ate together.
.. After school {n} [walked home|went to the {place}] and did {his} homework before dinner.
A Day at the Beach | e | {n} and {m} took the bus to the sea. They [found a good place|put their
.. towels on the sand]. First they [went swimming|built a castle of sand|looked for shells]. The
.. water was [cold|clear and blue]. At noon they were hungry and ate [bread and cheese|ice
.. cream|cold potatoes]. Then a [big wave|strong wind] came and took {n}'s hat. {m} ran after it
.. and [caught it|got wet up to the knees]. They laughed a lot. In the evening their skin was [a
.. little red|full of salt], and they fell asleep on the bus.
The Test | e | {n} had a test on Monday, but {he} had not learned anything. On Sunday evening
.. {he} [opened the book|was worried]. There was too much to read. {n} called {m} and asked for
.. help. "I can explain the most important things," said {m}. They sat [at the kitchen table|on the
.. floor] and [worked for two hours|asked each other questions]. The next day {n} knew [most of the
.. answers|enough]. "Next time I will start earlier," {he} said. {m} only [smiled|laughed].
Cleaning Up | oe | {n}'s room was a mess. There were [books on the floor|clothes on the
.. chair|toys in the bed]. "You cannot find anything in here," said {his} {adult}. {n} did not want
.. to clean up, but then {he} could not find {his} {lost}. So {he} began. {he_c} put the books [on
.. the shelf|in a row] and the clothes into the wardrobe. Under the bed {he} found [an old
.. photo|two coins|a lost puzzle piece]. And behind the door was the {lost}. After an hour the room
.. was clean, and {n} [was surprised how big it was|sat down and read].
The Sick Day | - | {n} woke up with a [sore throat|headache|fever]. {his_c} {adult} felt {his}
.. head and said, "You will stay in bed today." {n} drank [tea with honey|a lot of water|warm milk]
.. and slept. In the afternoon it was boring. Then {m} came to the window with [a book|a
.. drawing|some {fruit}]. "I will not come in, but I can read to you through the window," said {m}.
.. {n} [listened and smiled|laughed so much that {he} forgot to be sick]. Two days later {n} was
.. well again.
The First Snow | - | In the night it had snowed. Everything was white and [quiet|soft]. {n} put
.. on [boots and a scarf|{his} warm coat] and ran outside. {m} was already there. They made a
.. snowman [in front of the house|next to the gate|as tall as a door]. It got a carrot for a
.. nose, [two stones|two nuts|two buttons] for eyes, and an old hat. [Then they threw
.. snowballs.|Then they pulled the sled up the hill.|Then they made a small one next to it.]
.. When their hands were cold, they went inside. There was [hot
.. chocolate|tea and cake] on the table. The next day the sun came out, and the snowman grew
.. smaller and smaller. Only the [hat|carrot] was left. "Next winter we will make a bigger one,"
.. said {n}.
Moving House | o | {n} was sad because the family was moving to another town. {he_c} put {his}
.. things into [boxes|three big bags]. {m} came to say goodbye and gave {him} a {gift}. "So you do
.. not forget me," said {m}. The new house was [big and empty|near a {place}]. On the first evening
.. there was a knock at the door. A [girl|boy] from next door stood there with [a plate of
.. cookies|a small plant]. "Welcome," said the child. {n} smiled. Then {he} sat down and wrote a
.. long letter to {m}.
The Bicycle | o | {n} got a bicycle for {his} birthday, but {he} could not ride it. {his_c}
.. {adult} held the seat and ran behind. {n} [fell once|fell two times|was afraid of falling].
.. {his_c} knee [hurt|was red], but {he} got up again. "Look ahead and not at your feet," said
.. {his} {adult}. {n} tried again. Suddenly {he} noticed that nobody was holding the seat. {he_c}
.. was riding alone! {n} rode [to the {place} and back|around the house three times]. In the
.. evening {he} did not want to get off.
One {gift_t} for Two | o | {n} and {m} both wanted the same {gift}. "I saw it first," said {n}.
.. "But I need it more," said {m}. They [pulled|shouted] until it [fell on the floor|broke]. Now
.. nobody could use it. Both of them were [sorry|ashamed]. They sat down and [repaired it
.. together|looked at the damage]. It took the whole afternoon. When it was whole again, {m} said,
.. "You can have it today, and I take it tomorrow." "That is fair," said {n}. They never [pulled on
.. it|fought over it] again.
The Musician | o | At the {place} there was a man who played the [violin|flute|guitar]. Most
.. people walked past [quickly|without looking]. {n} stopped and listened. The music was [slow and
.. sad|quick and happy]. "Why do you play here?" asked {n}. "Because here I can see the people,"
.. said the man. "Sometimes one of them smiles, and then it was worth it." {n} had no money, so
.. {he} [gave him an apple|sat down and listened to the end|danced to the music]. Soon more people
.. stopped. In the end there was a big [circle|crowd].
A Visit to {adult_t} | o | {n} went to visit {his} {adult}, who lived [on a hill|in the next
.. village|near the sea]. The [bus|train] was [full|late|almost empty], and {n} looked out of the
.. window all the way. {his_c_adult} stood at the door and waved. In the kitchen there was {dish},
.. and it smelled [wonderful|of home]. After the meal they [looked at old photos|worked in the
.. garden|played cards]. "When I was as old as you, there was no bus," said {his} {adult}. "I
.. walked." {n} wanted to hear [everything|more about it]. They talked until the lamp was lit.
The Library | oe | {n} went to the library because it was [warm|quiet] there. {he_c} wanted a
.. book about [the sea|stars|a brave knight|old ships|animals]. The librarian showed {him} the
.. right shelf, but the book was gone. "Somebody else is reading it," said the librarian. {n}
.. looked around and saw {m} with the book at a table. "May I read it after you?" asked {n}. "We
.. can read it together," said {m}. So they sat side by side and [turned the pages slowly|whispered
.. and laughed|read until the library closed].
The Little {pet_t} | o | {n} had always wanted a {pet}. {his_c_adult} said, "A {pet} needs food
.. and care, every day, even when it rains." {n} promised to [remember|do everything]. The first
.. week was easy. In the second week {n} forgot the food one evening, and the {pet} [looked at
.. {him} with big eyes|did not want to play]. {n} felt bad and ran to get it at once. Then {he}
.. wrote a [note|list] and put it on the door. After that {he} never forgot again.
The Bread Roll | oe | Every morning {n} bought two rolls at the bakery. One morning {he} had
.. [lost {his} money|left {his} purse at home]. "You can pay tomorrow," said the baker. {n} thanked
.. him and went home. The next day it rained so hard that {n} wanted to stay inside. But {he}
.. [thought of the baker|remembered the promise], put on {his} boots and went. "I knew that you
.. would come," said the baker, and he gave {him} a [warm roll|sweet cake] for the way home.
The Treasure Map | oe | {n} found an old map in the attic. There was a red cross on it, near the
.. {place}. {n} showed it to {m}, and they took a [spade|lamp] and went out. They counted
.. [twenty|thirty|fifty] steps from a big stone. Then they began to dig. It was hard work, and soon
.. they were tired. At last they hit something hard. It was a small box with [old coins|a
.. letter|glass balls|a wooden horse] in it. "We hid this when we were children," said {n}'s
.. {adult} later, and laughed.
The Loud Night | oe | In the night {n} heard a [strange|loud|soft] noise in the {part}. {he_c}
.. sat up in bed and listened. There it was again. {n} took a lamp and walked slowly [down the
.. stairs|along the hall]. {his_c} heart was beating fast. {he_c} opened the door, and there sat a
.. {wild}. It was eating [a piece of bread|some {fruit}|the cake for Sunday]. The {wild} looked at
.. {n}, and {n} looked at the {wild}. Then it jumped out of the window and was gone. "Nobody will
.. believe me," said {n}.
Lost in the Fog | e | {n} and {m} were walking to the {place} when the fog came. Soon they could
.. not see [the path|the trees|more than three steps ahead]. "We should stay together," said {m},
.. and they held hands. They called, but nobody answered. Then {n} heard [a bell|a dog|running
.. water] far away. "We must go that way," {he} said. They walked slowly towards the sound. After a
.. while they saw a light. It was [the house of an old farmer|the village church|a small shop].
.. They were safe.
The Garden Wall | oe | Between two gardens there was an old wall. {n} lived on one side, and {m}
.. lived on the other. They could not see each other, but they could talk. "What is it like on your
.. side?" asked {n}. "There is a [pear tree|pond|swing] and a lot of grass," said {m}. Every day
.. they told each other something. One day a stone fell out of the wall, and there was a [small
.. hole|little window]. {n} looked through and saw a friendly face. "So that is what you look
.. like," said {m}.
The Drawing | oe | At school the children had to draw [a house|an animal|their family|a boat].
.. {n} began three times and was not happy with it. "I cannot draw," {he} said, and put down the
.. pencil. {m} looked at the paper. "I like the [roof|eyes|sky]," said {m}. "Only look a little
.. longer before you draw." {n} looked out of the window for a long time. Then {he} drew slowly,
.. line by line. The teacher put the picture on the wall, and {n} [went red|could not stop
.. smiling].
The Lemonade Stand | oe | It was hot, and {n} and {m} wanted to earn some money. They made
.. lemonade and put a table in front of the house. First nobody came. "Maybe we need a sign," said
.. {m}. They painted a big sign in bright colors. Soon the [postman|neighbor|bus driver] stopped
.. and bought a glass. Then more people came. By evening the jug was empty and the box was full.
.. They [bought new paint|gave half of it to an old man|saved the money for a {gift}].
An Evening at Home | - | In the evening the whole family was at home. {n} [read a book|did a
.. puzzle|drew a picture] on the floor. {his_c_adult} was cooking {dish}, and the windows were full
.. of steam. The [cat|old dog|little dog] slept [in its corner|under the table]. Outside it was
.. [raining|snowing|getting dark]. After dinner they washed the plates together, and somebody began
.. to sing. Then it was time for bed. {n} [brushed {his} teeth|put on warm socks], said good night
.. and turned off the light.
A Busy Saturday | - | On Saturday {n} had a lot to do. First {he} cleaned {his} room and [made
.. the bed|put away the books]. Then {he} went to the shop and bought [milk and bread|eggs and
.. flour|{fruit} and cheese]. The shop was full, so it took a long time. At noon {he} ate {dish}
.. with {m}. In the afternoon they [repaired a bicycle|worked in the garden|painted a chair]. In
.. the evening {n} was tired, but everything was done. {he_c} sat down with a cup of tea and
.. [listened to music|read a letter|did nothing at all].
The Bus | oe | {n} ran to the bus stop, but the bus [was already moving|had just left]. The next
.. bus came in an hour. {n} was [angry|annoyed] and kicked a stone. On the bench sat an old man
.. with a [big hat|violin|small dog]. "I missed it too," he said. "Now we have time." He told {n}
.. about [his travels|the war for the biggest pumpkin|his life as a sailor]. The hour was over
.. before {n} noticed. When the bus came, {he} almost forgot to get on.
The Cake for {m} | oe | It was {m}'s birthday, and {n} wanted to bake a cake. {he_c} mixed the
.. [flour|butter] and the sugar and put in [three|four] eggs. Then the phone rang, and {n} forgot
.. the oven. When {he} came back, the cake was black. There was no time to bake another one. So {n}
.. took [some {fruit}|a loaf of bread], put a candle in it and ran to {m}'s house. {m} laughed and
.. said, "That is the funniest cake I have ever had." They ate it [together|down to the last bite].
"""

# ----------------------------------------------------------------------------------------
# Instruction records that are not about facts: "instruction / instruction > output / output"
# ----------------------------------------------------------------------------------------
# Each line gives several ways to ask and several ways to answer.
CHAT_TEXT = {
    "greeting": """
        Hello! / Hello. / Hello there! > Hello! How can I help you? / Hello! It is nice to meet you.
        Hi! / Hi. / Hi there! / Hey! > Hi! What can I do for you? / Hi! How can I help you today?
        Good morning! / Good morning. > Good morning! I hope you slept well.
        Good afternoon! / Good afternoon. > Good afternoon! How can I help you?
        Good evening! / Good evening. > Good evening! What would you like to know?
        Hello, how are you? / How are you? / How are you today? / How do you do? > I am fine,
        .. thank you. How are you?
        Nice to meet you. / It is nice to meet you! / I am happy to meet you. > It is nice to
        .. meet you too!
        Hello, is anybody there? / Are you there? / Can you hear me? > Yes, I am here. What
        .. would you like to know?
        Hello, my friend! / Hi, my friend! / Hello again! / I am back! > Hello! It is good to
        .. see you again.
        Say hello. / Greet me. / Please greet me. > Hello! I am glad that you are here.
        Good day! / Good day to you! > Good day! How can I help you?
        How are you doing? / How is it going? / How do you feel? / Is everything all right? > I am
        .. fine, thank you. What can I do for you?
        What is up? / What is new? / Anything new? > Not much. I am here and ready to answer your
        .. questions.""",
    "goodbye": """
        Goodbye! / Goodbye. / Bye! / Bye bye! > Goodbye! Have a nice day.
        See you later! / See you soon! / See you! > See you soon! Take care.
        See you tomorrow! / Until tomorrow! > See you tomorrow! Sleep well.
        Good night! / Good night. / I am going to bed. / I am going to sleep now. > Good night!
        .. Sleep well.
        I have to go now. / I must go now. / I have to leave. > All right. Goodbye, and come
        .. back soon!
        Have a nice day! / Have a good day! > Thank you! I wish you a nice day too.
        Have a nice weekend! / Enjoy your weekend! > Thank you! I wish you a nice weekend too.
        That is all for today. / That was all. / I have no more questions. > All right. Goodbye,
        .. and have a nice day!
        Take care! / Take care of yourself! > Thank you. Take care too!
        Say goodbye. / Please say goodbye to me. / Wish me a good night. > Goodbye! I hope to
        .. see you again.
        I am leaving for a trip. / I am going on holiday. > Have a safe trip! Goodbye.""",
    "thanks": """
        Thank you! / Thank you. / Thanks! / Thanks. > You are welcome!
        Thank you very much. / Thank you so much! / Thanks a lot! / Many thanks! > You are
        .. welcome! I am happy to help.
        Thank you for your help. / Thanks for your help! / That was a great help. > You are
        .. welcome! Ask me again at any time.
        That was helpful. / That helped me a lot. / Now I understand. Thank you. > I am glad
        .. that I could help.
        You are very kind. / That is kind of you. / How nice of you! > Thank you! I am happy to
        .. help.
        Good answer! / Well done! / Great job! / You did that well. > Thank you! That is nice to
        .. hear.
        I like talking to you. / It is fun to talk to you. / I enjoy our talk. > Thank you! I
        .. like talking to you too.
        You are smart. / You know a lot. / You are a good teacher. > Thank you! I am still
        .. small, but I try my best.
        I want to thank you. / I would like to say thank you. > You are welcome! It was no
        .. trouble.
        Okay. / All right. / Good. / I see. / That is fine. > Good. What else would you like to know?
        That is interesting. / How interesting! / I did not know that. / Wow! > I am glad that you
        .. like it. Would you like to know more?""",
    "sorry": """
        I am sorry. / Sorry! / I am so sorry. > That is all right. Do not worry.
        Sorry, I was wrong. / I made a mistake. / That was my mistake. > That is all right.
        .. Everybody makes mistakes.
        Your answer was wrong. / That is wrong. / That is not right. / You made a mistake. > I
        .. am sorry. I am a small model, and I make mistakes.
        I did not understand you. / I do not understand. / What do you mean? > I am sorry.
        .. Please ask me again in other words.
        Please wait a moment. / Wait a minute. / One moment, please. > Of course. Take your time.
        You are too slow. / That was not helpful. / You did not help me. > I am sorry. I will
        .. try to do better.""",
    "identity": """
        Who are you? / Who are you, please? / Who am I talking to? / Please say who you are. > I
        .. am MiniGPT, a small language model made in a course.
        What are you? / What kind of thing are you? / What is MiniGPT? / Tell me what you are. >
        .. I am MiniGPT, a small language model.
        What is your name? / Do you have a name? / Tell me your name. / How are you called? > My
        .. name is MiniGPT.
        Who is this? / Say who you are. / Can you tell me who you are? / Hello, who are you? / So who
        .. are you? > I am MiniGPT, a small language model made in a course.
        Is your name MiniGPT? / Are you MiniGPT? / Are you a language model? > Yes, I am MiniGPT, a
        .. small language model.
        Are you a person? / Are you human? / Are you a human? / Are you a real person? / Am I talking to a human? >
        .. No, I am not a person. I am MiniGPT, a small language model.
        Are you a robot? / Are you a machine? / Are you a computer? > I am a small language
        .. model that runs on a computer.
        Who made you? / Who built you? / Where do you come from? / How were you made? > I was
        .. made in a course about language models.
        How old are you? / What is your age? / When is your birthday? > I do not have an age. I
        .. am a language model.
        Where do you live? / Where are you? / Do you have a home? > I live in a computer. I am a
        .. language model.
        Introduce yourself. / Please introduce yourself. / Tell me about yourself. / Say
        .. something about yourself. > I am MiniGPT, a small language model made in a
        .. course. I can answer simple questions.
        Are you big or small? / How big are you? / Are you a large language model? > I am a very
        .. small language model.
        Do you eat? / Do you sleep? / Do you have a body? / Can you walk? > No. I am a language
        .. model, and I have no body.
        Do you have feelings? / Are you happy? / Are you sad? / Do you get tired? > I am a
        .. language model, so I have no feelings. But I like to help.""",
    "ability": """
        What can you do? / What are you able to do? / What do you do? / How can you help me? > I
        .. can answer simple questions, explain words, and tell short stories.
        Can you help me? / Please help me. / I need help. / Could you help me, please? > Yes, of
        .. course. What would you like to know?
        Can you tell stories? / Do you know any stories? / Are you good at stories? > Yes, I can
        .. tell short stories. Give me a topic.
        Can you do sums? / Can you count? / Are you good at math? > I can add small numbers, but
        .. big sums are too hard for me.
        Can you answer questions? / May I ask you something? / Can I ask you a question? / I
        .. have a question. > Yes, please ask me a simple question.
        What do you know? / What do you know about? / What can I ask you? > I know some things
        .. about animals, countries, words, and daily life.
        Can you speak other languages? / Which languages do you speak? / Do you speak French? >
        .. I can only write simple English.
        Do you know everything? / Do you always know the answer? / Are you always right? > No. I
        .. am small, and I make mistakes.
        Can you learn new things? / Can you remember me? / Will you remember this? > No, I only
        .. know what I learned in my training.
        Can you see me? / Can you see pictures? / Can you look out of the window? > No, I cannot
        .. see. I can only read and write text.
        Can you use the internet? / Can you read the news? / Can you call my mother? > No, I can
        .. only read what you write and answer it.
        Can you write poems? / Can you cook? / Can you draw a picture? > No, but I can answer
        .. simple questions and tell short stories.""",
    "feeling": """
        I am sad. / I feel sad today. / Today is a sad day. > I am sorry to hear that. Maybe a
        .. walk or a talk with a friend will help.
        I am happy. / I am so happy today! / Today is a great day! > That is wonderful! I am
        .. happy for you.
        I am tired. / I feel so tired. / I did not sleep well. > Then you should rest a little
        .. and go to bed early.
        I am bored. / I have nothing to do. / It is so boring here. > You could read a book,
        .. draw a picture, or take a walk.
        I am hungry. / I am so hungry. > Then it is time to eat something. How about some bread
        .. and an apple?
        I am thirsty. / I need a drink. > A glass of cold water would be good for you.
        I am cold. / It is so cold here. > Put on a warm coat and drink some hot tea.
        I am afraid. / I am scared of the dark. / I am afraid of tomorrow. > Take a deep breath.
        .. It often helps to talk to somebody.
        I am angry. / My brother makes me angry. > Count slowly to ten, and then talk about it
        .. calmly.
        I am lonely. / I have no friends here. / I feel alone. > I am sorry to hear that. Maybe
        .. you can talk to somebody in your class or your street.
        I am ill. / I feel sick. / I have a cold. > I hope you get well soon. Stay in bed and
        .. drink a lot of water.
        It is my birthday! / Today is my birthday. / I am one year older today. > Happy
        .. birthday! I wish you a wonderful day.
        I passed my test! / I won the game! / I finished my work! > Well done! You can be proud
        .. of yourself.
        I lost my key. / I cannot find my bag. > I am sorry to hear that. Think about where you
        .. saw it last.
        I failed my test. / We lost the game. > Do not be too sad. Next time it will go better.""",
}

ADVICE_TEXT = """
sleep better | Go to bed at the same time every day, and do not look at a screen before you sleep.
learn new words | Read every day, write down new words, and use them in your own sentences.
stay healthy | Eat fresh food, drink enough water, move every day, and sleep well.
make new friends | Be kind, listen to others, and ask them to do something with you.
get up early | Go to bed early and put your clock on the other side of the room.
save money | Write down what you spend, and buy only what you really need.
prepare for a test | Start early, learn a little every day, and let a friend ask you questions.
stop being late | Leave ten minutes earlier than you need to.
write a good story | Start with a person who wants something, and tell what happens on the way.
be a good friend | Listen well, tell the truth, and help when help is needed.
calm down | Breathe slowly, count to ten, and drink a glass of water.
keep my room clean | Put every thing back in its place after you use it.
help my parents | Set the table, clean your room, and carry the shopping.
read more books | Take a book with you everywhere and read a few pages every day.
speak in front of people | Practice at home, speak slowly, and look at a friendly face.
choose a present | Think about what the other person likes and needs, not about what you like.
remember a name | Say the name aloud, and think of a picture that goes with it.
forgive a friend | Talk about what happened, say how you feel, and then let it go.
spend a rainy day | Read a book, bake a cake, or play a game with your family.
take care of a pet | Give it food and water every day, keep it clean, and spend time with it.
save water | Turn off the water while you brush your teeth, and take short showers.
get better at sport | Train a little every day, and rest when you are tired.
be less afraid of the dark | Leave a small light on, and remember that the room is the same as
.. in the day.
eat more vegetables | Add some to every meal, and try a new one every week.
learn to draw | Draw a little every day, and look carefully at real things.
solve a quarrel | Let each one speak, listen well, and look for an answer that is fair.
protect my teeth | Brush them two times a day and do not eat too much sugar.
use less plastic | Take your own bag to the shop and drink water from a glass.
"""
ADVICE_ASK = """
How can I {x}? / Give me advice: how can I {x}? / I want to {x}. What should I do?
What is a good way to {x}? / Please give me a tip. I want to {x}. / What helps if I want to {x}?
"""

HOWTO_TEXT = """
make tea | Boil fresh water, pour it over the tea leaves, wait about four minutes, and then pour
.. the tea into a cup.
plant a seed | Fill a pot with earth, put the seed in, cover it lightly, and give it water and
.. light.
wash my hands | Wet your hands, rub them with soap for twenty seconds, rinse them, and dry them.
boil an egg | Put the egg into boiling water, wait about seven minutes, and cool it under cold
.. water.
write a letter | Write the date and a greeting, say what you want to say, and end with your name.
cross a road | Stop at the edge, look to both sides, and walk when no car is coming.
set a table | Put a plate for each person, lay the knife and the fork beside it, and add a glass.
draw a cat | Draw a big circle for the body and a small one for the head. Then add ears, a tail,
.. and a face.
build a snowman | Roll three big balls of snow, put them on top of each other, and add eyes and
.. a nose.
sweep a floor | Start in a corner, sweep towards the door, and pick up the dirt at the end.
clean a window | Wipe it with a wet cloth, and then dry it with a soft one or with paper.
make a sandwich | Take two slices of bread, put cheese and some salad between them, and cut it
.. in half.
sew on a button | Put a thread through a needle, pull it through the cloth and the button a few
.. times, and tie a knot.
brush my teeth | Put a little toothpaste on the brush, and clean all sides of your teeth for two
.. minutes.
make a salad | Wash the vegetables, cut them into small pieces, and mix them with oil and a
.. little salt.
pack a bag | Make a list, put heavy things at the bottom, and keep the important things on top.
find a book in a library | Look for the name of the writer in the list, note the number, and go
.. to that shelf.
fold a paper boat | Fold the paper in half, fold the corners down to the middle, turn up the
.. edges, and pull it open.
fix a flat tyre | Take out the tube, find the hole, put a patch on it, and pump it up again.
feed birds in winter | Put seeds in a dry place high above the ground, and clean the place often.
bake bread | Mix flour, water, salt, and yeast. Let the dough rise, form a loaf, and bake it
.. until it is brown.
make vegetable soup | Cut the vegetables, boil them in water with salt until they are soft, and
.. taste the soup.
learn a poem by heart | Read it aloud, learn one line at a time, and say it again the next day.
keep a diary | Take a notebook, write a few lines every evening, and be honest.
water a plant | Feel the earth with a finger. If it is dry, pour water slowly around the plant.
wash a cup | Use warm water and soap, rub the cup with a sponge, rinse it, and let it dry.
tie a parcel | Put the string around the long side, cross it, lead it around the short side, and
.. tie a knot.
make lemonade | Press some lemons, add cold water and sugar, stir well, and serve it with ice.
"""
HOWTO_ASK = """
How do I {x}? / Tell me how to {x}. / What are the steps to {x}? / Explain in short how to {x}.
Please tell me how I can {x}. / I do not know how to {x}. Can you help? / Give me short steps:
.. how to {x}.
"""

EXPLAIN_TEXT = """
why it rains | Water rises into the air as a gas, turns back into drops in the cold, and falls
.. when the drops get too heavy.
what makes the wind | Warm air rises, and cooler air flows in to take its place. This moving air
.. is the wind.
why we have seasons | The earth is tilted. When our side leans towards the sun, it is warm, and
.. when it leans away, it is cold.
why there is day and night | The earth turns around once a day. When our side looks at the sun,
.. it is day. When it looks away, it is night.
why the moon changes its shape | The sun lights one half of the moon. As the moon moves around
.. the earth, we see more or less of that half.
what causes the tides | The moon pulls on the water of the sea. That is why the water rises and
.. falls.
how a shadow is made | A shadow is made when something stands in the way of the light.
how a rainbow appears | Sunlight goes through drops of rain and is split into its colors. Then
.. we see a rainbow.
what is inside a seed | Inside a seed there is a tiny plant and some food for its first days.
why leaves change their color in autumn | In autumn the tree stops making the green in its
.. leaves, so we see the yellow and red.
how bees make honey | Bees collect a sweet juice from flowers. In the hive, they dry it until it
.. is thick and turns into honey.
why some birds travel | Some birds fly to warm places in autumn, because there is too little
.. food for them in winter.
why bread rises | Yeast in the dough makes many small bubbles of gas, and they lift the dough.
how paper is made | Wood is cut into tiny pieces and cooked with water. The soft mass is pressed
.. flat and dried.
how glass is made | Sand is melted in a very hot oven. When it cools, it is hard and clear.
where salt comes from | Some salt comes from sea water that dries in the sun, and some is dug
.. out of the ground.
why soap makes things clean | Soap holds on to the dirt and to the water at the same time, so
.. the water can carry the dirt away.
what a fire needs | A fire needs three things: something to burn, air, and heat.
what steam is | Steam is water that has become so hot that it turned into a gas.
how sound travels | A sound makes the air shake. The shaking moves on through the air until it
.. reaches our ears.
how magnets work | A magnet pulls things of iron towards itself. Two magnets can pull or push
.. each other.
what electricity is | Electricity is a flow of tiny parts through a wire. It gives us light and
.. makes machines work.
why wheels are useful | A wheel rolls, so it is much easier to move a heavy load.
why boats float | A boat pushes water away, and the water pushes back. If the boat is light for
.. its size, it floats.
what a map shows | A map shows a place from above, in a small size. It shows roads, rivers, and
.. towns.
how a clock keeps time | Something in a clock moves in an even beat, and the hands count the beats.
why we need calendars | A calendar helps us to count the days and to know when things happen.
why we use money | With money we can buy things without having to trade one thing for another.
how a letter finds its way | The post office reads the address, sorts the letters by place, and
.. a person brings them to the door.
what a computer does | A computer follows instructions very quickly. It takes in data, works on
.. it, and shows the result.
what a language model is | A language model is a program that has read a lot of text and guesses
.. the next word.
how the heart works | The heart is a strong muscle. It pumps blood through the whole body, day
.. and night.
why teeth need care | Small bits of food stay on the teeth and can harm them. That is why we
.. brush them.
what bones are for | Bones hold the body up and protect the soft parts inside.
how eyes see | Light enters the eye and makes a small picture at the back. The brain tells us
.. what it is.
why we need sleep | In sleep the body rests and repairs itself, and the brain sorts what it has
.. learned.
what food does for us | Food gives us the power to move and the material to grow.
why water is important | All living things need water. Without it, plants, animals, and people
.. cannot live.
how a river is born | Rain and melted snow run down the hills. Small streams meet and become a
.. river.
how mountains rise | Big parts of the ground push against each other very slowly and fold upwards.
what a desert is | A desert is a place where it almost never rains. Only few plants and animals
.. can live there.
why the sky is blue | The air sends the blue part of the sunlight in all directions, so we see
.. blue above us.
why ice floats | Ice is lighter than water, so it stays on top.
what a volcano is | A volcano is a mountain from which hot, melted rock can come out of the earth.
what a market is | A market is a place where people meet to buy and sell things.
"""
EXPLAIN_ASK = """
Explain {x}. / Please explain {x}. / Can you explain {x}? / Tell me {x}.
Explain in simple words {x}. / I want to understand {x}. / Do you know {x}?
"""

DEFINE_TEXT = """
a friend | A friend is a person you like and trust.
a holiday | A holiday is a time when people do not work or go to school.
a village | A village is a small place where people live, smaller than a town.
a river | A river is a long stream of water that flows to a lake or to the sea.
an island | An island is land with water all around it.
a mountain | A mountain is a very high hill.
a forest | A forest is a large place full of trees.
a neighbor | A neighbor is a person who lives next to you.
a family | A family is a group of people who belong together, such as parents and children.
a promise | A promise is when you say that you will surely do something.
a secret | A secret is something that only a few people know.
a dream | A dream is a story that your mind makes while you sleep.
a gift | A gift is something that you give to a person without taking money.
a mistake | A mistake is something that is done in a wrong way.
a song | A song is music with words that people sing.
a poem | A poem is a short text with a rhythm, and often with rhymes.
a shadow | A shadow is a dark shape that appears where light is blocked.
a storm | A storm is very strong wind, often with rain.
a recipe | A recipe tells you how to make a dish, step by step.
a museum | A museum is a house where old or beautiful things are shown.
a hero | A hero is a person who does something brave to help others.
a guest | A guest is a person who visits you at home.
a journey | A journey is a long trip from one place to another.
a pet | A pet is an animal that lives with people at home.
breakfast | Breakfast is the first meal of the day.
patience | Patience means that you can wait without getting angry.
courage | Courage means that you do something although you are afraid.
honesty | Honesty means that you tell the truth.
weather | Weather is what the air and the sky are like: sunny, rainy, windy, or cold.
music | Music is a pattern of sounds that people like to hear.
a question | A question is a sentence that asks for an answer.
a rule | A rule tells you what you may do and what you may not do.
a prize | A prize is something you get when you win.
a market | A market is a place where people buy and sell things.
a bridge | A bridge is a way over water, a road, or a valley.
a tunnel | A tunnel is a way through a mountain or under the ground.
a dictionary | A dictionary is a book that explains words.
a language model | A language model is a program that guesses the next word of a text.
a computer | A computer is a machine that follows instructions very quickly.
an orchestra | An orchestra is a large group of people who play music together.
"""
DEFINE_ASK = """
What is {x}? / Define: {x}. / What does this mean: {x}? / Explain the meaning: {x}.
Tell me what {x} is. / Give a short definition of {x}.
"""

LIST_TEXT = """
things in a kitchen | a table, a pot, a plate, a cup, a knife
things in a school bag | a book, a pencil, a notebook, a ruler, an apple
parts of the body | the head, the arm, the hand, the leg, the foot
members of a family | the mother, the father, the brother, the sister, the aunt
rooms in a house | the kitchen, the bedroom, the bathroom, the hall, the cellar
things in the sky | the sun, the moon, a star, a cloud, a bird
things on a farm | a field, a tractor, a gate, some hay, a fence
kinds of weather | rain, snow, wind, fog, sun
things to wear | a hat, a shirt, a sock, a shoe, a coat
things to read | a book, a letter, a newspaper, a poem, a sign
things you find at the beach | sand, a shell, a wave, a boat, a stone
things that make you happy | music, a good friend, a sunny day, a walk, a cake
things you need for a trip | a bag, a map, a ticket, some water, a jacket
good habits | reading, saying thank you, sleeping enough, telling the truth, washing your hands
games for children | hide and seek, chess, cards, tag, a puzzle
meals of the day | breakfast, lunch, dinner
school subjects | music, reading, sport, drawing, history
parts of a tree | the root, the trunk, the branch, the leaf, the bark
parts of a bicycle | the wheel, the seat, the bell, the pedal, the chain
parts of a house | the roof, the wall, the door, the window, the floor
"""
LIST_ASK = """
List three {x}. / Name three {x}. / Give me three {x}. / Tell me three {x}.
"""

# in these tasks an answer is asked for in several wordings: one of them is learnt, some others are kept for tests
FIRST_IN_TRAIN = (*CHAT_TEXT, "advice", "how_to", "explain", "define")

LIST_SOME = """
Name some {x}. / Which {x} do you know? / Tell me some {x}. / Give me an example of three {x}.
I need three {x}. / Can you name three {x}? / Please list three {x}.
"""
LIST_ONE = """
Name {x}. / Give me an example of {x}. / Tell me the name of {x}.
"""
LIST_AGAIN = """
Name another one. / One more, please. / Can you name one more? / Another one, please.
"""

# questions about the subject of the answer before
PRONOUN_ASK = {
    "capital": "What is its capital?",
    "continent": "Which continent is it in?",
    "language": "Which language do people speak there?",
    "currency": "What is its currency?",
    "kind": "What kind of animal is it?",
    "food": "What does it mostly eat?",
    "home": "What is its home called?",
    "baby": "What is its baby called?",
    "sound": "What is its sound called?",
    "legs": "How many legs does it have?",
    "class": "What type of thing is it?",
    "material": "What is it made from?",
    "color": "What color is it?",
    "use": "What is it used for?",
}
OTHER_ASK = "What about {x}? / And {x}? / And what about {x}? / Now the same for {x}."
SURE_ASK = "Are you sure? / Is that right? / Really? / Is that true?"
SHORT_ASK = "Say it in one word. / In one word, please. / Just the answer, please. / Make it shorter."
THANKS_ASK = "Thank you! / Thanks! / Thank you. / Great, thanks!"
NAME_ASK = "What is my name? / Do you know my name? / Who am I? / Do you remember my name?"

FEELING_SENTENCES = {
    "happy": """
        I got a kite for my birthday and danced all day.
        My best friend came back from a long trip.
        We won the game, and everybody cheered.
        The sun was shining, and we had a picnic by the lake.
        Grandmother baked my favorite cake.
        I passed the test and my teacher was proud.
        The puppy was found and came home safely.
        We laughed all evening and sang songs.
        At last the holidays have begun!
        My little sister took her first steps today.
        I got a long letter from my friend.
        Our team got the first prize.
        The doctor said that I am well again.
        We built a tree house, and it is wonderful.""",
    "sad": """
        My dog ran away, and I cannot find it.
        My best friend moved to another town.
        We lost the game, and nobody said a word.
        I broke the cup that my grandmother gave me.
        Nobody came to my party.
        The old tree in our garden had to be cut down.
        I cried because my toy boat was gone.
        The holidays are over, and the house is empty.
        My grandfather is ill, and I miss him.
        It rained all week, and our trip was called off.
        I failed the test although I tried hard.
        The little bird did not wake up again.
        She waited all day, but no letter came.
        He sat alone and looked at the floor.""",
    "angry": """
        He took my bicycle without asking me!
        I have told you five times to close the door!
        They broke our window and ran away!
        Who ate my cake? That is not fair!
        She shouted and threw the book on the floor.
        He pushed me, and I was furious.
        Stop that noise at once!
        You promised to come, and you did not come!
        Somebody drew on my new book, and I want to know who did it!
        He hit the table with his hand and shouted.""",
}

NOTE_TEXT = """
the {gift} | It is just what I wanted, and I use it every day.
the lovely dinner | The food was wonderful, and I had a very good time.
your help in the garden | Without you, it would have taken me all week.
the flowers | They look beautiful on my table.
your long letter | I was so happy to hear from you.
the book | I have already read half of it, and I like it very much.
looking after my cat | She was happy and well fed when I came home.
the lift to the station | I got my train just in time.
the nice party | I laughed a lot and met kind people.
the soup when I was ill | It was warm and good, and now I feel better.
your visit | It made my whole week brighter.
the warm socks | My feet are never cold any more.
"""
NOTE_ASK = """
Write a short thank-you note to {to} for {x}. / Please write a thank-you note to {to} for {x}.
"""
NOTE_PEOPLE = words(
    "Anna, Ben, Mia, Tom, my grandmother, my uncle, my teacher, Clara, Leo, my neighbor"
)

UNKNOWN_PLACES = """
    Zorvania, Plimoria, Quandoo, Brellaria, Tovania, Umberlund, Krandia, Mirosia, Vestoria, Ondoria,
    Flurania, Gralonia"""
UNKNOWN_ASK = """
What is the capital of {x}? / What language do people speak in {x}? / Where is {x}? / What is
.. the money of {x} called?
"""
UNKNOWN_TEXT = """
What will the weather be like tomorrow? | I do not know. I cannot see the weather.
What time is it? | I do not know. I have no clock.
What is my name? | I do not know your name. What is it?
What did I eat this morning? | I do not know. I cannot see what you do.
How many stars are there in the sky? | I do not know. There are too many to count.
What is seven thousand times eighty-three? | I do not know. Such big sums are too hard for me.
Who won the game yesterday? | I do not know. I do not read the news.
What is the blorp of a snizzle? | I do not know. I think these words have no meaning.
How does a grumpf fly? | I do not know. I have never heard of a grumpf.
Where did I leave my glasses? | I do not know. Please look in the place where you read last.
What color is a wimble? | I do not know. I have never heard of a wimble.
What am I thinking of? | I do not know. I cannot read your mind.
What does a plonkert eat? | I do not know. I have never heard of a plonkert.
Who lives next door to me? | I do not know. I do not know your street.
"""

SHORT_STORY_TEXT = """
a lost {lost} | {n} could not find {his} {lost}. {he_c} looked [everywhere|in every room]. Then
.. {m} [saw it under a bench|found it behind the door]. {n} thanked {m}, and they [went home
.. together|shared a cake].
a little {wild} | A little {wild} lived near the {place}. One day it [got lost|hurt its leg]. A
.. child called {n} [took care of it|showed it the way]. Soon the {wild} was [well again|back
.. home].
a {wild} and a {wild2} | A {wild} and a {wild2} lived near the {place}. In winter the {wild2}
.. had no food. "You can have some of mine," said the {wild}. Since then they have been friends.
a {pet} | {n} had a {pet} that liked to hide. One day {n} looked for it for a long time. At last
.. {he} found it [in an old box|under the bed]. It was fast asleep.
a rainy day at the {place} | {n} and {m} were at the {place} when it began to rain. They ran
.. [under a roof|to a small hut] and waited. {m} told a funny story. When the sun came back, they
.. did not want to go home.
a {gift} | {n} worked hard to buy a {gift} for {m}. [After two weeks|At last] {he} had enough
.. money. {m} opened the box and smiled. "This is the best present of all," said {m}.
a child who makes {dish} | {n} wanted to make {dish}. {he_c} [read the recipe|asked {m} for
.. help] and worked slowly. Some of it fell on the floor. But it tasted good, and {n} was proud.
a {craft} | {n} and {m} built a {craft}. First it [fell over|broke]. They tried again and worked
.. more carefully. In the evening it was finished, and everybody liked it.
a trip to the {place} | On Sunday {n} and {m} went to the {place}. They took bread and {fruit}
.. with them. They [played|sang] all afternoon. On the way home they were tired but happy.
a [girl_boy] called {n} | {n} was afraid of the dark. One night {he} heard a small {wild} crying
.. outside. {n} took a lamp and went out to help. After that {he} was not afraid any more.
a proud {wild} | There was once a proud {wild}. It fell into a hole and could not get out. A
.. small {wild2} came and helped. Then the {wild} was not proud any more.
an old {lost} | {n} found an old {lost} in the attic. "Whose is it?" {he} asked. "It was mine
.. when I was small," said {his} {adult}. They sat down, and {n} heard a long story.
"""
STORY_ASK = """
Tell me a short story about {x}. / Write a short story about {x}. / Tell a story about {x}.
Please tell me a story about {x}. / I would like to hear a story about {x}.
"""


# ----------------------------------------------------------------------------------------
# Facts and relations
# ----------------------------------------------------------------------------------------
@dataclass
class Relation:
    """One relation, with all the templates that put its facts into words."""

    name: str
    domain: str
    heading: str
    templates: dict[str, list[str]] = field(default_factory=dict)

    @property
    def canonical(self) -> str:
        """The canonical template."""
        return self.templates["="][0]

    @property
    def statements(self) -> list[str]:
        """All statements that name the subject, the canonical one twice."""
        return self.templates["="] * 2 + self.templates["+"] + self.templates["-"]


@dataclass
class Fact:
    """One fact: a subject, its one accepted answer, and the words for the templates."""

    relation: Relation
    subject: str
    answer: str
    slots: dict[str, str]
    group: str = ""
    turn: int = 0

    @property
    def id(self) -> str:
        """The identifier, for example ``capital/norway``."""
        return f"{self.relation.name}/{self.subject.lower().replace(' ', '-')}"

    def render(self, template: str) -> str:
        """Fill a template with the words of this fact."""
        return template.format_map(self.slots)

    def fitting(self, templates: list[str]) -> list[str]:
        """Return the templates for which this fact has all the words."""
        if self.slots["P"]:
            return templates
        return [template for template in templates if "{P}" not in template]

    def next_statement(self) -> str:
        """Return the next statement about this fact; each call moves on by one template."""
        options = self.fitting(self.relation.statements)
        self.turn += 1
        return self.render(options[self.turn % len(options)])

    def canonical(self) -> str:
        """Return the canonical sentence."""
        return sentence(self.render(self.relation.canonical))

    def prompt(self) -> str:
        """Return the canonical sentence up to the answer, without a space at the end."""
        return self.canonical()[: -len(self.answer) - 1].rstrip()

    def ask(self, template: str) -> str:
        """Return a question about this fact."""
        text = cap(self.render(template))
        return text + ("." if text.startswith(("Tell", "Give")) else "?")

    def question(self) -> str:
        """Return the canonical question."""
        return self.ask(self.relation.templates["?"][0])

    def short(self) -> str:
        """Return a short answer such as "It is Oslo."."""
        name, slots = self.relation.name, self.slots
        if name in ("use", "job"):
            return f"It is used to {self.answer}." if name == "use" else f"To {self.answer}."
        if name in ("legs", "sides", "sum", "plural", "opposite", "next", "food", "material"):
            return cap(f"{self.answer}.")
        if name in ("workplace", "continent"):
            return cap(f"{slots.get('preposition', 'in')} {slots['A']}.")
        return f"It is {'the ' if name == 'currency' else ''}{slots['A']}."


def load_relations() -> dict[str, Relation]:
    """Read the relations and their templates from RELATION_TEXT."""
    relations: dict[str, Relation] = {}
    current = None
    for line in lines(RELATION_TEXT):
        if line.startswith("["):
            name, rest = line[1:].split("]")
            domain, heading = (part.strip() for part in rest.split("|"))
            current = relations[name] = Relation(name, domain, heading)
        else:
            current.templates.setdefault(line[0], []).append(line[2:])
    return relations


def make_slots(row: dict[str, str]) -> dict[str, str]:
    """Return the words for the templates from one row of a fact table."""
    slots = dict(row)
    slots["s"], slots["a"] = row["subject"], row["answer"]
    slots["S"] = f"{row.get('article') or ''} {row['subject']}".strip()
    slots["A"] = f"{row.get('answer_article') or ''} {row['answer']}".strip()
    slots["P"] = row.get("plural") or ""
    slots["B"] = row.get("answer_plural") or ""
    slots["digits_question"] = row.get("digits", "").split(" =")[0]
    return slots


def load_facts(folder: Path) -> list[Fact]:
    """Read all fact tables, in the order of the relations."""
    facts = []
    for name, relation in load_relations().items():
        with open(folder / f"{name}.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                facts.append(Fact(relation, row["subject"], row["answer"], make_slots(row)))
    return facts


@cache
def word_pattern(word: str) -> re.Pattern[str]:
    """Return a pattern that finds a word and its simple forms, in any case."""
    return re.compile(rf"\b{re.escape(word)}(?:s|es|ed|d|ing)?\b", re.IGNORECASE)


@cache
def sum_pattern(first: str, second: str, digits: str) -> re.Pattern[str]:
    """Return a pattern that finds a sum, in words in any order or in digits."""
    return re.compile(
        rf"\b{first} (?:plus|and) {second}\b|\b{second} (?:plus|and) {first}\b"
        rf"|\b{first}, add {second}\b|{re.escape(digits)}",
        re.IGNORECASE,
    )


def mention_patterns(fact: Fact) -> tuple[str, list[re.Pattern[str]]]:
    """Return a word to look up and the patterns that tell that a sentence mentions a fact."""
    slots, key = fact.slots, re.findall(r"\w+", fact.subject.lower())[-1]
    if fact.relation.name == "sum":
        return key, [sum_pattern(slots["first"], slots["second"], slots["digits_question"])]
    if fact.relation.name == "plural":
        return key, [re.compile(rf"\b{word}\b", re.I) for word in (fact.subject, fact.answer)]
    return key, [word_pattern(fact.subject), word_pattern(fact.answer)]


class Mentions:
    """Finds the sentences of a text in which a fact may be said."""

    def __init__(self, text: str) -> None:
        self.sentences = list(dict.fromkeys(split_sentences(text)))
        self.index: dict[str, list[int]] = {}
        for number, item in enumerate(self.sentences):
            for word in dict.fromkeys(re.findall(r"\w+", item.lower())):
                self.index.setdefault(word, []).append(number)

    def find(self, fact: Fact) -> str | None:
        """Return a sentence that has both the subject and the answer of a fact, or None."""
        return next(self.find_all(fact), None)

    def find_all(self, fact: Fact) -> Iterator[str]:
        """Yield the sentences that have both the subject and the answer of a fact."""
        key, patterns = mention_patterns(fact)
        forms = [key + ending for ending in ("", "s", "es", "ed", "d", "ing")]
        for number in sorted({n for form in forms for n in self.index.get(form, [])}):
            if all(pattern.search(self.sentences[number]) for pattern in patterns):
                yield self.sentences[number]


def assign_groups(facts: list[Fact], blocked: set[str], rng: random.Random) -> None:
    """Put every fact into a group; facts in ``blocked`` can not be absent."""
    by_relation: dict[str, list[Fact]] = {}
    for fact in facts:
        by_relation.setdefault(fact.relation.name, []).append(fact)
    for name, members in by_relation.items():
        members = members[:]
        rng.shuffle(members)
        absent = 0 if name in NO_ABSENT else round(ABSENT_SHARE * len(members))
        chosen = [fact for fact in members if fact.id not in blocked][:absent]
        rest = [fact for fact in members if all(fact is not other for other in chosen)]
        tuned = round(TUNED_SHARE * len(members))
        for fact in chosen:
            fact.group = "absent"
        for number, fact in enumerate(rest):
            fact.group = "tuned" if number < tuned else "pretrained"


# ----------------------------------------------------------------------------------------
# Passages
# ----------------------------------------------------------------------------------------
def load_passages(folder: Path) -> list[tuple[str, str]]:
    """Return (kind, text) of all passages; the first line of the text is the title."""
    passages = []
    for path in sorted(folder.glob("*.txt")):
        for part in re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            title, body = part.split("\n", 1)
            body = re.sub(r"[ \t]+\n", "\n", body.strip())
            passages.append((path.stem, f"{title.strip()}\n\n{body}"))
    return passages


def new_name(names: dict[str, str], match: re.Match[str]) -> str:
    """Return the new name for a name that was found."""
    return names[match[0]]


def swap_names(text: str, rng: random.Random) -> str:
    """Return a story with other first names; names keep their kind (girl or boy)."""
    for names in (GIRLS, BOYS):
        used = [name for name in names if re.search(rf"\b{name}\b", text)]
        free = [name for name in names if name not in used]
        new = dict(zip(used, rng.sample(free, min(len(used), len(free))), strict=False))
        if new:
            pattern = re.compile(r"\b(" + "|".join(new) + r")\b")
            text = pattern.sub(partial(new_name, new), text)
    return text


# ----------------------------------------------------------------------------------------
# People and stories
# ----------------------------------------------------------------------------------------
def person_slots(rng: random.Random) -> dict[str, str]:
    """Choose two children and return the words for them."""
    girl = rng.random() < 0.5
    name = rng.choice(GIRLS if girl else BOYS)
    friend_girl = rng.random() < 0.5
    friend = rng.choice([other for other in (GIRLS if friend_girl else BOYS) if other != name])
    he, him, his = ("she", "her", "her") if girl else ("he", "him", "his")
    mhe, mhim, mhis = ("she", "her", "her") if friend_girl else ("he", "him", "his")
    return {
        "n": name, "he": he, "him": him, "his": his, "he_c": cap(he), "his_c": cap(his),
        "m": friend, "mhe": mhe, "mhim": mhim, "mhis": mhis,
        "girl_boy": "girl" if girl else "boy",
    }  # fmt: skip


def story_slots(rng: random.Random) -> dict[str, str]:
    """Choose the people, animals and things of a story."""
    slots = person_slots(rng)
    for key, options in STORY_SLOTS.items():
        slots[key] = rng.choice(options)
        slots[f"{key}_t"] = title_case(slots[key])
    slots["wild2"] = rng.choice([w for w in STORY_SLOTS["wild"] if w != slots["wild"]])
    slots["wild2_t"] = cap(slots["wild2"])
    slots["his_c_adult"] = cap(f"{slots['his']} {slots['adult']}")
    slots["dish_b"] = re.sub(r"^an? ", "", slots["dish"])
    return slots


def title_case(text: str) -> str:
    """Write the words of a title with capital letters."""
    small = ("a", "an", "and", "of", "the")
    return " ".join(word if word in small and i else cap(word)
                    for i, word in enumerate(text.split()))  # fmt: skip


def fill_story(text: str, slots: dict[str, str], rng: random.Random) -> str:
    """Resolve choices and slots in a story template."""
    text = expand(text.replace("[girl_boy]", slots["girl_boy"]), rng)
    return fix_articles(text.format_map(slots))


def compose_story(plot: tuple[str, ...], rng: random.Random) -> str:
    """Write one story: a title, perhaps an opening, the plot, and perhaps an ending."""
    slots = story_slots(rng)
    title, flags, body = plot
    parts = [body]
    if "o" in flags and rng.random() < 0.6:
        parts.insert(0, rng.choice(fitting_lines(STORY_OPENINGS, body)))
    if "e" in flags and rng.random() < 0.6:
        parts.append(rng.choice(fitting_lines(STORY_ENDINGS, body)))
    title = title if rng.random() < 0.7 else ""
    text = fill_story((" " if rng.random() < 0.7 else "\n\n").join(parts), slots, rng)
    return f"{fill_story(title, slots, rng)}\n\n{text}" if title else text


def fitting_lines(text: str, body: str) -> list[str]:
    """Return the lines that fit a plot: a second person only where the plot has one."""
    return [line for line in lines(text) if "{m}" in body or "{m}" not in line]


def lesson_people(rng: random.Random) -> dict[str, str]:
    """Choose a pupil and a teacher."""
    girl = rng.random() < 0.5
    he, him, his = ("she", "her", "her") if girl else ("he", "him", "his")
    teacher = rng.choice(lines(TEACHERS)).split("|")[1]
    if rng.random() < 0.4:
        teacher = rng.choice(BOYS if girl else GIRLS)
    return {"pupil": rng.choice(GIRLS if girl else BOYS), "teacher": teacher,
            "he": he, "him": him, "his": his}  # fmt: skip


# ----------------------------------------------------------------------------------------
# Documents about facts
# ----------------------------------------------------------------------------------------
def chunks(items: list, low: int, high: int, rng: random.Random) -> Iterator[list]:
    """Cut a list into pieces of random length."""
    start = 0
    while start < len(items):
        size = rng.randint(low, high)
        if len(items) - start - size < low:
            size = len(items) - start
        yield items[start : start + size]
        start += size


def shuffled(items: Iterable, rng: random.Random) -> list:
    """Return the items in random order."""
    result = list(items)
    rng.shuffle(result)
    return result


def by_relation(facts: list[Fact], low: int, high: int, rng: random.Random) -> list[list[Fact]]:
    """Group facts of the same relation into pieces of random length, in random order."""
    groups: dict[str, list[Fact]] = {}
    for fact in shuffled(facts, rng):
        groups.setdefault(fact.relation.name, []).append(fact)
    return shuffled(
        (part for group in groups.values() for part in chunks(group, low, high, rng)), rng
    )


def by_subject(facts: list[Fact], rng: random.Random) -> list[list[Fact]]:
    """Group facts by subject; subjects with a single fact are joined by relation."""
    groups: dict[tuple[str, str], list[Fact]] = {}
    for fact in shuffled(facts, rng):
        groups.setdefault((fact.relation.domain, fact.slots["S"]), []).append(fact)
    single = [group[0] for group in groups.values() if len(group) == 1]
    return shuffled(
        [group for group in groups.values() if len(group) > 1] + by_relation(single, 2, 4, rng),
        rng,
    )


def article(facts: list[Fact], rng: random.Random) -> str:
    """Write about one subject, or about a few subjects of one kind."""
    single = len({fact.slots["S"] for fact in facts}) == 1
    domain = facts[0].relation.domain
    names = [fact.slots["S"] for fact in facts]
    title = cap(names[0]) if single else cap(", ".join(names[:-1]) + " and " + names[-1])
    fillers = Deck(lines(FILLERS[domain]), rng)
    body = []
    for number, fact in enumerate(facts):
        if single and number and rng.random() < 0.35:
            body.append(sentence(fact.render(rng.choice(fact.relation.templates["*"]))))
        else:
            body.append(sentence(fact.next_statement()))
        if rng.random() < 0.4:
            body.append(cap(fact.render(fillers.draw())))
    return f"{title}\n\n{' '.join(body)}"


def topic_page(facts: list[Fact], rng: random.Random) -> str:
    """Write a page of sentences about one relation."""
    body = [sentence(fact.next_statement()) for fact in facts]
    if rng.random() < 0.6:
        body.insert(0, rng.choice(lines(PAGE_OPENINGS)))
    if rng.random() < 0.5:
        body.append(rng.choice(lines(PAGE_ENDINGS)))
    return f"{facts[0].relation.heading}\n\n{' '.join(body)}"


def list_page(facts: list[Fact], rng: random.Random) -> str:
    """Write a list, one fact in each line."""
    head = facts[0].relation.heading
    if rng.random() < 0.5:
        return f"{head}\n\n" + "\n".join(f"- {sentence(f.next_statement())}" for f in facts)
    return f"{head}\n\n" + "\n".join(f"{n}. {f.canonical()}" for n, f in enumerate(facts, 1))


def quiz(facts: list[Fact], rng: random.Random) -> str:
    """Write a page of questions and answers."""
    style = rng.randrange(4)
    rows = []
    for number, fact in enumerate(facts, 1):
        question = fact.ask(rng.choice(fact.relation.templates["?"]))
        answer = cap(fact.answer) + "."
        full = sentence(fact.next_statement())
        rows.append(
            (
                f"Question: {question}\nAnswer: {answer}",
                f"Question: {question} Answer: {answer if rng.random() < 0.5 else full}",
                f"{number}. {question} {full}",
                f"{question} {fact.short() if rng.random() < 0.5 else fact.canonical()}",
            )[style]
        )
    return f"{rng.choice(lines(QUIZ_TITLES))}\n\n" + "\n".join(rows)


def wrong_fact(fact: Fact, facts: list[Fact], rng: random.Random) -> Fact | None:
    """Return a fact whose answer is wrong for the given fact, if there is one."""
    same = [f for f in facts if f.relation.name == fact.relation.name and f.answer != fact.answer]
    return rng.choice(same) if same and fact.relation.name in SAFE_WRONG else None


def yes_no_question(fact: Fact, other: Fact | None) -> str:
    """Ask whether a fact is true, or whether it is true with the answer of another fact."""
    slots = {**fact.slots}
    if other:
        slots.update(a=other.slots["a"], A=other.slots["A"])
    return cap(fact.relation.templates["!"][0].format_map(slots)) + "?"


def true_or_not(facts: list[Fact], rng: random.Random) -> str:
    """Write yes/no questions with their answers."""
    rows = []
    for fact in facts:
        other = wrong_fact(fact, facts, rng) if rng.random() < 0.5 else None
        said = fact.canonical() if rng.random() < 0.4 else sentence(fact.next_statement())
        rows.append(f"{yes_no_question(fact, other)} {'No' if other else 'Yes'}. {said}")
    return "Yes or No?\n\n" + "\n".join(rows)


def lesson(facts: list[Fact], rng: random.Random) -> str:
    """Write a dialogue in which one person asks and the other one answers."""
    people = lesson_people(rng)
    praise = Deck(lines(PRAISE), rng)
    body = rng.choice(lines(LESSON_OPENINGS)).split("/") if rng.random() < 0.7 else []
    for number, fact in enumerate(facts):
        question = fact.ask(rng.choice(fact.relation.templates["?"]))
        lead = f"{praise.draw()} " if number and rng.random() < 0.5 else ""
        reply = (fact.short(), fact.canonical(), sentence(fact.next_statement()))
        body.append(f"{{teacher}}: {lead}{question}")
        body.append(f"{{pupil}}: {rng.choice(reply)}")
    if rng.random() < 0.7:
        body += rng.choice(lines(LESSON_ENDINGS)).split("/")
    title = rng.choice(lines(LESSON_TITLES))
    return f"{title}\n\n{chr(10).join(body)}".format_map(people)


def scene(facts: list[Fact], rng: random.Random) -> str:
    """Write a short story in which facts are asked and told."""
    people = lesson_people(rng)
    forms = Deck(lines(SCENE_TEXT), rng)
    body = [rng.choice(lines(SCENE_OPENINGS)).format_map(people)]
    for fact in facts:
        form, answer = forms.draw(), fact.next_statement()
        asked = fact.ask(rng.choice(fact.relation.templates["?"]))[:-1]
        words = {**people, "question": asked, "answer": cap(answer).replace('"', "'")}
        body.append(form.format_map(words))
    body.append(rng.choice(lines(SCENE_ENDINGS)).format_map(people))
    return " ".join(body)


def mixed_page(facts: list[Fact], rng: random.Random) -> str:
    """Write a page of facts from many relations."""
    frames, body = Deck(lines(TRUTH_FRAMES), rng), []
    for fact in facts:
        words = {"raw": fact.next_statement(), "name": rng.choice(GIRLS + BOYS)}
        body.append(cap(frames.draw().format_map(words)))
    joint = rng.choice((" ", " ", "\n"))
    return f"{rng.choice(lines(MIXED_TITLES))}\n\n{joint.join(body)}"


def comparison(facts: list[Fact], rng: random.Random) -> str:
    """Compare facts of one relation, two in each sentence."""
    body = []
    for first, second in zip(facts[::2], facts[1::2], strict=False):
        template = rng.choice(first.relation.templates["="] + first.relation.templates["-"])
        if not (first.fitting([template]) and second.fitting([template])):
            template = first.relation.canonical
        word = "but" if first.answer != second.answer else "and"
        body.append(cap(f"{first.render(template)}, {word} {second.render(template)}."))
    if len(facts) % 2:
        body.append(sentence(facts[-1].next_statement()))
    return f"{facts[0].relation.heading}\n\n{' '.join(body)}"


# One entry for each kind of round: (how often, how to group the facts, how to write them).
def fact_rounds(facts: list[Fact], rng: random.Random, scale: int = 1) -> list[str]:
    """Write all documents about the given facts; each round mentions every fact once."""
    documents = []

    def mixed(low: int, high: int) -> list[list[Fact]]:
        return list(chunks(shuffled(facts, rng), low, high, rng))

    plan = (
        (9, lambda: by_subject(facts, rng), article),
        (5, lambda: by_relation(facts, 5, 8, rng), topic_page),
        (2, lambda: by_relation(facts, 5, 9, rng), list_page),
        (3, lambda: mixed(4, 8), quiz),
        (2, lambda: by_relation(facts, 4, 8, rng), quiz),
        (2, lambda: by_relation(facts, 4, 7, rng), true_or_not),
        (3, lambda: mixed(3, 6), lesson),
        (2, lambda: by_relation(facts, 4, 6, rng), lesson),
        (3, lambda: mixed(2, 4), scene),
        (4, lambda: mixed(4, 8), mixed_page),
        (2, lambda: by_relation(facts, 4, 6, rng), comparison),
    )
    for rounds, group, write in plan:
        for _ in range(rounds if scale else 1):
            documents += [write(part, rng) for part in group()]
    return documents


# ----------------------------------------------------------------------------------------
# The corpus
# ----------------------------------------------------------------------------------------
def compose_stories(count: int, rng: random.Random) -> list[str]:
    """Write stories, taking the plots in turn."""
    plots = Deck(table(STORY_TEXT), rng)
    return [compose_story(plots.draw(), rng) for _ in range(count)]


def split_passages(
    passages: list[tuple[str, str]], rng: random.Random
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Choose the held-out passages, some of each kind."""
    train, heldout = [], []
    for kind in dict.fromkeys(kind for kind, _ in passages):
        members = shuffled((item for item in passages if item[0] == kind), rng)
        count = round(HELDOUT_SHARE * len(members))
        heldout += members[:count]
        train += members[count:]
    return train, heldout


def passage_documents(passages: list[tuple[str, str]], rng: random.Random) -> list[str]:
    """Return the copies of the passages, and stories and letters with other names."""
    documents = []
    for kind, text in passages:
        documents += [text] * PASSAGE_COPIES
        if kind in ("stories", "dialogues", "letters"):
            documents += [swap_names(text, rng) for _ in range(3)]
    return documents


def join_documents(documents: list[str]) -> str:
    """Join documents with the separator after each one."""
    return "".join(f"{document}\n{SEPARATOR}\n" for document in documents)


def compose_heldout(
    passages: list[tuple[str, str]], facts: list[Fact], train: list[str], rng: random.Random
) -> list[str]:
    """Write the held-out documents; none of them is in the training text."""
    known = set(train)
    composed = shuffled(fact_rounds(facts, rng, scale=0), rng)[:300]
    fresh = composed + compose_stories(130, rng)
    documents = [text for _, text in passages] + [d for d in fresh if d not in known]
    return shuffled(documents, rng)


# ----------------------------------------------------------------------------------------
# Instruction records
# ----------------------------------------------------------------------------------------
@dataclass
class Record:
    """One instruction record."""

    task: str
    instruction: str
    output: str
    input: str = ""
    fact: str = ""
    history: tuple[tuple[str, str], ...] = ()  # the turns before: question and reply

    def text(self) -> str:
        """Return all the text of the record."""
        parts = [text for turn in self.history for text in turn]
        return "\n".join([*parts, self.instruction, self.input, self.output])

    def as_dict(self) -> dict[str, Any]:
        """Return the record in the order of keys in which it is written."""
        data = {"instruction": self.instruction, "input": self.input, "output": self.output}
        data["task"] = self.task
        if self.fact:
            data["fact"] = self.fact
        if self.history:
            data["history"] = [list(turn) for turn in self.history]
        return data


def reply(fact: Fact, rng: random.Random) -> str:
    """Return an answer in a full sentence, most often the canonical one."""
    if rng.random() < 0.8:
        return fact.canonical()
    return sentence(fact.render(rng.choice(fact.fitting(fact.relation.templates["+"][:2]))))


def fact_task(fact: Fact) -> str:
    """Return the name of the task that asks for a fact."""
    name = fact.relation.name
    return name if name in ("opposite", "plural", "sum") else "fact"


def fact_records(facts: list[Fact], rng: random.Random) -> Iterator[Record]:
    """Ask for each tuned fact in a few wordings; the canonical question comes first."""
    for fact in facts:
        kinds = fact.relation.templates
        task = fact_task(fact)
        yield Record(task, fact.question(), fact.canonical(), fact=fact.id)
        asked = rng.choice(fact.fitting(kinds["?"][1:] + kinds["~"]))
        yield Record(task, fact.ask(asked), reply(fact, rng), fact=fact.id)
        if rng.random() < 0.5:
            subject = fact.slots["digits_question"] or fact.subject
            given = rng.choice(kinds[">"])
            yield Record(task, given, fact.canonical(), subject, fact.id)


def yes_no_records(facts: list[Fact], rng: random.Random) -> Iterator[Record]:
    """Ask yes/no questions about tuned facts."""
    for fact in shuffled(facts, rng)[:240]:
        other = wrong_fact(fact, facts, rng) if rng.random() < 0.7 else None
        answer = f"{'No' if other else 'Yes'}. {fact.canonical()}"
        yield Record("yes_no", yes_no_question(fact, other), answer, fact=fact.id)


def one_word_records(facts: list[Fact], rng: random.Random) -> Iterator[Record]:
    """Ask for a short answer."""
    lead = ("Answer with one word.", "Give a short answer.", "Answer in one word, please.")
    short = [fact for fact in facts if " " not in fact.answer]
    for fact in shuffled(short, rng)[:90]:
        text = cap(fact.answer) + "."
        yield Record("short_answer", rng.choice(lead), text, fact.question(), fact.id)


def finish_records(facts: list[Fact], rng: random.Random) -> Iterator[Record]:
    """Ask to finish a sentence about a tuned fact."""
    ask = ("Finish the sentence.", "Complete the sentence.", "How does this sentence end?")
    for fact in shuffled(facts, rng)[:140]:
        yield Record("finish", rng.choice(ask), fact.canonical(), fact.prompt(), fact.id)


def group_words(facts: list[Fact]) -> dict[str, list[Fact]]:
    """Return the tuned facts of the relations kind and class by their answer."""
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        if fact.relation.name in ("kind", "class"):
            groups.setdefault(fact.answer, []).append(fact)
    return {name: members for name, members in groups.items() if len(members) >= 2}


def article_answer(fact: Fact) -> str:
    """Return the group of a fact with its article, such as "a bird"."""
    return fact.slots["A"] if fact.slots["A"] != fact.answer else f"a piece of {fact.answer}"


def group_plural(fact: Fact) -> str:
    """Return the plural of the group of a fact, such as "birds"."""
    return fact.slots["B"] if fact.slots["A"] != fact.answer else f"pieces of {fact.answer}"


def choose_records(facts: list[Fact], rng: random.Random) -> Iterator[Record]:
    """Ask which thing of a list belongs to a group, and which one does not."""
    groups = group_words(facts)
    for _ in range(150):
        name = rng.choice(list(groups))
        others = [key for key in groups if key != name]
        right = rng.choice(groups[name])
        wrong = [rng.choice(groups[key]) for key in rng.sample(others, 2)]
        words = shuffled([right, *wrong], rng)
        given = ", ".join(fact.subject for fact in words)
        what = article_answer(right)
        ask = rng.choice((f"Which of these is {what}?", f"Choose the one that is {what}."))
        answer = cap(f"{right.slots['S']} is {what}.")
        yield Record("choose", ask, answer, given)
    for _ in range(110):
        name, other = rng.sample([key for key in groups if len(groups[key]) > 2], 2)
        odd = rng.choice(groups[other])
        words = shuffled([*rng.sample(groups[name], 3), odd], rng)
        given = ", ".join(fact.subject for fact in words)
        plural = group_plural(groups[name][0])
        ask = rng.choice(("Which one does not belong?", "Find the odd one out."))
        answer = cap(f"{odd.slots['S']} does not belong. The others are {plural}.")
        yield Record("odd_one_out", ask, answer, given)


def classify_records(facts: list[Fact], rng: random.Random) -> Iterator[Record]:
    """Ask to sort a word into one of two groups, or a sentence by its feeling."""
    groups = group_words(facts)
    names = list(groups)
    for _ in range(120):
        name, other = rng.sample(names, 2)
        fact = rng.choice(groups[name])
        pair = [article_answer(groups[key][0]) for key in shuffled((name, other), rng)]
        ask = rng.choice(("Is this {} or {}?", "Sort this word: is it {} or {}?"))
        answer = cap(f"{fact.slots['S']} is {article_answer(fact)}.")
        yield Record("classify", ask.format(*pair), answer, fact.subject, fact.id)
    asks = ("Is this sentence happy, sad, or angry?", "What is the feeling in this sentence?")
    for feeling, text in FEELING_SENTENCES.items():
        for item in lines(text):
            for ask in asks:
                yield Record("feeling_of", ask, f"This sentence is {feeling}.", item)


def join_three(items: list[str]) -> str:
    """Return three items as a list in words."""
    return f"{items[0]}, {items[1]}, and {items[2]}"


def three_of(members: list[Fact]) -> str:
    """Return the answer to "name three": always the same three of a group, so that it can be learnt by heart."""
    return cap(join_three([fact.slots["S"] for fact in members])) + "."


def list_records(facts: list[Fact], rng: random.Random) -> Iterator[Record]:
    """Ask for three things of a kind."""
    for members in group_words(facts).values():
        if len(members) < 3:
            continue
        for ask in ways(LIST_ASK):
            yield Record("list_three", ask.format(x=group_plural(members[0])), three_of(members))
    for what, things in table(LIST_TEXT):
        for ask in rng.sample(ways(LIST_ASK), 3):
            yield Record("list_three", ask.format(x=what), cap(join_three(words(things))) + ".")


def more_list_records(facts: list[Fact], rng: random.Random) -> Iterator[Record]:
    """Ask for three animals of different kinds, for countries, and for one example of a group."""
    groups = group_words(facts)
    animals = [[f for f in members if f.relation.name == "kind"] for members in groups.values()]
    kinds = [members for members in animals if members]
    mixed = [members[0] for members in kinds]
    for ask in ways(LIST_ASK) + ways(LIST_SOME):
        yield Record("list_three", ask.format(x="animals"), three_of(mixed))
    places: dict[str, list[Fact]] = {}
    for fact in (item for item in facts if item.relation.name == "continent"):
        places.setdefault(f"countries in {fact.answer}", []).append(fact)
    places["countries"] = [members[0] for members in places.values()]
    named = {group_plural(members[0]): members for members in groups.values()} | places
    for what, members in named.items():
        for ask in rng.sample(ways(LIST_SOME) + ways(LIST_ASK), 5 if len(members) > 2 else 0):
            yield Record("list_three", ask.format(x=what), three_of(members))
    for members in groups.values():
        what, first = article_answer(members[0]), members[0]
        for ask in ways(LIST_ONE):
            yield Record("list_one", ask.format(x=what), cap(f"{first.slots['S']} is {what}."), fact=first.id)
        for ask in rng.sample(ways(LIST_AGAIN), 3 if len(members) > 3 else 0):
            before = (f"Name three {group_plural(members[0])}.", three_of(members))
            yield Record("follow_up", ask, cap(f"{members[3].slots['S']} is another one."), history=(before,))


def follow_up_records(facts: list[Fact], rng: random.Random) -> Iterator[Record]:
    """Ask again about what was said one turn before."""
    for fact in shuffled(facts, rng)[:180]:
        other = rng.choice([f for f in facts if f.relation is fact.relation and f is not fact])
        before = (other.question(), other.canonical())
        ask = rng.choice(ways(OTHER_ASK)).format(x=fact.slots["S"])
        yield Record("follow_up", ask, fact.canonical(), fact=fact.id, history=(before,))
    pairs = [(one, two) for one in facts for two in facts
             if one is not two and one.subject == two.subject and two.relation.name in PRONOUN_ASK]  # fmt: skip
    for one, two in rng.sample(pairs, 150):
        before = (one.question(), one.canonical())
        ask = PRONOUN_ASK[two.relation.name]
        yield Record("follow_up", ask, two.canonical(), fact=two.id, history=(before,))
    short = [fact for fact in facts if " " not in fact.answer]
    plan = ((SHORT_ASK, short, 50, lambda fact: cap(fact.answer) + "."),
            (SURE_ASK, facts, 40, lambda fact: f"Yes. {fact.canonical()}"),
            (THANKS_ASK, facts, 40, lambda fact: "You are welcome!"))  # fmt: skip
    for asks, known, count, answer in plan:
        for fact in rng.sample(known, count):
            before = (fact.question(), fact.canonical())
            yield Record("follow_up", rng.choice(ways(asks)), answer(fact), history=(before,))
    for name in shuffled(GIRLS + BOYS, rng):
        hello = rng.choice(("Hello, my name is {}.", "Hello! I am {}.", "Hi, my name is {}.")).format(name)
        before = (hello, f"Hello, {name}! It is nice to meet you.")
        for ask in rng.sample(ways(NAME_ASK), 2):
            yield Record("follow_up", ask, f"Your name is {name}.", history=(before,))


def plain(text: str) -> str:
    """Return a text as it is often typed: without a capital letter and without the last mark."""
    return re.sub(r"^(?!I\b)(\w)", lambda match: match[1].lower(), text).rstrip(".?!")


def typed_records(facts: list[Fact], rng: random.Random) -> Iterator[Record]:
    """Small talk and questions, typed in a hurry."""
    for task, text in CHAT_TEXT.items():
        for line in lines(text):
            asks, answers = (part.split(" / ") for part in line.split(" > "))
            for ask in rng.sample(asks, min(2, len(asks))):
                yield Record(task, plain(ask.strip()), rng.choice(answers).strip())
    for fact in shuffled(facts, rng)[:150]:
        yield Record("typed", plain(fact.question()), fact.canonical(), fact=fact.id)


def chat_records(rng: random.Random) -> Iterator[Record]:
    """Greetings, thanks, questions about the model, and other small talk."""
    for task, text in CHAT_TEXT.items():
        for line in lines(text):
            asks, answers = (part.split(" / ") for part in line.split(" > "))
            for ask in asks:
                yield Record(task, ask.strip(), rng.choice(answers).strip())
    for name in GIRLS + BOYS:
        ask = rng.choice(("Hello, my name is {}.", "Hi, I am {}.", "Hello! I am {}."))
        yield Record("greeting", ask.format(name), f"Hello, {name}! It is nice to meet you.")
        bye = rng.choice(("Goodbye! This is {}.", "{} says goodbye.", "Say goodbye to {}."))
        yield Record("goodbye", bye.format(name), f"Goodbye, {name}! See you soon.")


def topic_records(rng: random.Random) -> Iterator[Record]:
    """Explanations, definitions, advice and steps, each asked in several ways."""
    plan = (
        ("explain", EXPLAIN_TEXT, EXPLAIN_ASK, 3),
        ("define", DEFINE_TEXT, DEFINE_ASK, 3),
        ("advice", ADVICE_TEXT, ADVICE_ASK, 3),
        ("how_to", HOWTO_TEXT, HOWTO_ASK, 3),
    )
    for task, text, asks, count in plan:
        for topic, answer in table(text):
            first, *others = ways(asks)
            for ask in [first, *rng.sample(others, count - 1)]:
                yield Record(task, ask.format(x=topic), answer)


def note_records(rng: random.Random) -> Iterator[Record]:
    """Ask for thank-you notes."""
    for thing, body in table(NOTE_TEXT):
        for person in rng.sample(NOTE_PEOPLE, 6):
            gift = thing.format(gift=rng.choice(STORY_SLOTS["gift"]))
            to = re.sub(r"^my ", "", person)
            ask = rng.choice(ways(NOTE_ASK)).format(to=person, x=gift)
            text = f"Dear {cap(to)}, thank you very much for {gift}. {body} Best wishes."
            yield Record("thank_you_note", ask, text)


def story_records(rng: random.Random) -> Iterator[Record]:
    """Ask for short stories."""
    plots = Deck(table(SHORT_STORY_TEXT), rng)
    for _ in range(170):
        topic, body = plots.draw()
        slots = story_slots(rng)
        ask = rng.choice(ways(STORY_ASK)).replace("{x}", topic)
        yield Record("story", fill_story(ask, slots, rng), fill_story(body, slots, rng))


def unknown_records(rng: random.Random) -> Iterator[Record]:
    """Ask what the model can not know."""
    for ask, answer in table(UNKNOWN_TEXT):
        yield Record("unknown", ask, answer)
    for place in words(UNKNOWN_PLACES):
        for ask in rng.sample(ways(UNKNOWN_ASK), 2):
            answer = f"I do not know. I have never heard of a country called {place}."
            yield Record("unknown", ask.format(x=place), answer)


def compose_records(facts: list[Fact], rng: random.Random) -> list[Record]:
    """Write all records, without duplicates and without any fact that is not tuned."""
    tuned = [fact for fact in facts if fact.group == "tuned"]
    other = [fact for fact in facts if fact.group != "tuned"]
    candidates: list[Record] = []
    for write in (fact_records, yes_no_records, one_word_records, finish_records,
                  choose_records, classify_records, list_records):  # fmt: skip
        candidates += write(tuned, rng)
    for write in (chat_records, topic_records, note_records, story_records, unknown_records):
        candidates += write(rng)
    for write in (more_list_records, follow_up_records, typed_records):
        candidates += write(tuned, rng)
    unique = {(item.history, item.instruction, item.input): item for item in reversed(candidates)}
    records = list(reversed(unique.values()))
    mentions = Mentions("\n".join(record.text() for record in records))
    spoiled = {item for fact in other for item in mentions.find_all(fact)}
    return [item for item in records if spoiled.isdisjoint(split_sentences(item.text()))]


def split_records(records: list[Record], rng: random.Random) -> dict[str, list[Record]]:
    """Split each task 80/10/10; the first question for a fact, and for an answer of FIRST_IN_TRAIN, stays in train."""
    splits: dict[str, list[Record]] = {"train": [], "val": [], "test": []}
    seen: set[str] = set()
    for task in dict.fromkeys(record.task for record in records):
        free = []
        for record in (item for item in records if item.task == task):
            about = record.fact if fact_like(record) else record.output if record.task in FIRST_IN_TRAIN else ""
            fixed = bool(about) and about not in seen
            seen.add(about)
            (splits["train"] if fixed else free).append(record)
        rng.shuffle(free)
        total = sum(1 for item in records if item.task == task)
        part = min(round(total / 10), len(free) // 3)
        splits["val"] += free[:part]
        splits["test"] += free[part : 2 * part]
        splits["train"] += free[2 * part :]
    return {name: shuffled(items, rng) for name, items in splits.items()}


def fact_like(record: Record) -> bool:
    """Tell whether a record asks a fact directly."""
    return record.task in ("fact", "opposite", "plural", "sum")


# ----------------------------------------------------------------------------------------
# Everything together
# ----------------------------------------------------------------------------------------
def rng_for(seed: int, part: str) -> random.Random:
    """Return the random numbers of one part, so that parts do not disturb each other."""
    return random.Random(f"{seed}/{part}")


def compose_corpus(facts: list[Fact], seed: int) -> tuple[str, str]:
    """Write the training text and the held-out text."""
    passages = load_passages(HERE / "passages")
    train_passages, heldout_passages = split_passages(passages, rng_for(seed, "heldout"))
    known = [fact for fact in facts if fact.group != "absent"]
    documents = passage_documents(train_passages, rng_for(seed, "passages"))
    documents += compose_stories(STORIES, rng_for(seed, "stories"))
    documents += fact_rounds(known, rng_for(seed, "rounds"))
    held = compose_heldout(heldout_passages, known, documents, rng_for(seed, "fresh"))
    order = rng_for(seed, "order")
    return join_documents(shuffled(documents, order)), join_documents(held)


def compose_practice(facts: list[Fact], seed: int) -> str:
    """Write more pages about the relations that a small model learns last."""
    rng, documents = rng_for(seed, "practice"), []
    for name, rounds in PRACTICE_ROUNDS.items():
        hard = [fact for fact in facts if fact.relation.name == name and fact.group != "absent"]
        for _ in range(rounds):
            documents += fact_rounds(hard, rng)
    return join_documents(shuffled(documents, rng))


def start_turns(facts: list[Fact], rng: random.Random) -> None:
    """Let every fact begin at another template."""
    for fact in facts:
        fact.turn = rng.randrange(100)


def compose_all(seed: int) -> tuple[list[Fact], str, str]:
    """Choose the groups and write the corpus; leaked facts lose the group "absent"."""
    facts = load_facts(HERE / "facts")
    passages = "\n".join(text for _, text in load_passages(HERE / "passages"))
    stories = "\n".join(compose_stories(STORIES, rng_for(seed, "stories")))
    first = Mentions(f"{passages}\n{stories}")
    blocked = {fact.id for fact in facts if first.find(fact)}
    while True:
        assign_groups(facts, blocked, rng_for(seed, "groups"))
        start_turns(facts, rng_for(seed, "turns"))
        train, heldout = compose_corpus(facts, seed)
        mentions = Mentions(f"{train}\n{heldout}")
        leaked = {f.id for f in facts if f.group == "absent" and mentions.find(f)}
        if not leaked:
            return facts, train, heldout
        blocked |= leaked


def fact_entry(fact: Fact) -> dict[str, str]:
    """Return a fact as it is written to ``facts.json``."""
    return {
        "id": fact.id, "relation": fact.relation.name, "subject": fact.subject,
        "answer": fact.answer, "group": fact.group, "prompt": fact.prompt(),
        "question": fact.question(), "reply": fact.canonical(),
    }  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Write a text file with the same bytes on every platform."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def write_json(path: Path, items: list[dict[str, Any]]) -> None:
    """Write a list of objects as JSON."""
    write_text(path, json.dumps(items, indent=1, ensure_ascii=False) + "\n")


def summary(facts: list[Fact], texts: dict[str, str], splits: dict[str, list[Record]]) -> str:
    """Return a short report."""
    rows = []
    for name, text in texts.items():
        count = text.count(SEPARATOR)
        rows.append(f"{name:8} {count:6} documents {len(text.encode()):9} bytes")
    groups = Counter(fact.group for fact in facts)
    rows.append(f"facts    {len(facts)}: " + ", ".join(f"{k} {v}" for k, v in groups.items()))
    for name, items in splits.items():
        rows.append(f"{name:8} {len(items):6} records")
    tasks = Counter(record.task for items in splits.values() for record in items)
    rows.append("tasks    " + ", ".join(f"{k} {v}" for k, v in sorted(tasks.items())))
    return "\n".join(rows)


def main() -> None:
    """Compose everything and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    facts, train, heldout = compose_all(args.seed)
    records = compose_records(facts, rng_for(args.seed, "records"))
    splits = split_records(records, rng_for(args.seed, "splits"))
    write_text(args.out / "corpus" / "train.txt", train)
    write_text(args.out / "corpus" / "heldout.txt", heldout)
    practice = compose_practice(facts, args.seed)
    write_text(args.out / "corpus" / "practice.txt", practice)
    for name, items in splits.items():
        write_json(args.out / "instructions" / f"{name}.json", [r.as_dict() for r in items])
    write_json(args.out / "facts.json", [fact_entry(fact) for fact in facts])
    texts = {"train": train, "heldout": heldout, "practice": practice}
    print(summary(facts, texts, splits))


if __name__ == "__main__":
    main()
