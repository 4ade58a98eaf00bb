"""The training text of the bundled model: the Python standard library's own source.

Two kinds of document are made of it. *Source* documents are whole modules. *Chat* documents pair a
short request, made from a function's name and the first sentence of its docstring, with that
function's source. Both are split into training and validation by a hash of the module's path, so
that the same module is never on both sides.
"""

import ast
import hashlib
import json
import os
import random
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BEGIN, END, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = [BEGIN, END, USER, ASSISTANT]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] in ('user', 'assistant') %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Tests, third-party packages, generated tables, and modules that record how Python was built.
SKIPPED_PARTS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
SKIPPED_NAMES = ("_sysconfigdata", "entities.py", "stringprep.py", "this.py")
MAX_ANSWER_CHARS = 1000  # about 280 tokens: short answers are all a model of this size can hold
GREETING_COPIES = 30

ABOUT = (
    "I am a very small language model, compiled by fairy_compile with 2-bit weights. "
    "I was trained on the Python standard library. Ask me for a function."
)
GREETINGS = [
    ("Hello", f"Hello! {ABOUT}"),
    ("Hello!", f"Hello! {ABOUT}"),
    ("Hi", f"Hi! {ABOUT}"),
    ("hi there", f"Hi! {ABOUT}"),
    ("Hey, how are you?", f"Fine, thank you. {ABOUT}"),
    ("Who are you?", ABOUT),
    ("What are you?", ABOUT),
    ("Tell me about yourself.", ABOUT),
    (
        "What can you do?",
        "I write short Python functions. They look right more often than they are.",
    ),
    ("Can you help me?", "I can try. Ask me for a short Python function."),
    ("Thank you", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye", "Goodbye!"),
]


@dataclass
class Documents:
    """One side of the split: module sources and chats (each a list of request/answer pairs)."""

    source: list[str] = field(default_factory=list)
    chats: list[list[tuple[str, str]]] = field(default_factory=list)


def library_files(root: Path) -> list[Path]:
    """Return the modules worth reading, in a fixed order."""
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED_PARTS & set(path.relative_to(root).parts)
        and not path.name.startswith(SKIPPED_NAMES)
    ]


def first_sentence(docstring: str | None) -> str:
    """Return the first sentence of a docstring on one line, or an empty string."""
    paragraph = " ".join((docstring or "").strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
    return sentence if 8 <= len(sentence) <= 160 else ""


def requests_for(node: ast.AST, sentence: str, rng: random.Random) -> list[str]:
    """Word one or two requests that the definition `node` answers."""
    name = node.name
    words = " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)).lower()
    if isinstance(node, ast.ClassDef):
        plain = [f"class {name}", f"Write a class `{name}`.", f"Write the class {name}"]
        informed = [f"Write a class `{name}`: {sentence}", f"Write a Python class. {sentence}"]
    else:
        signature = f"{name}({ast.unparse(node.args)})"
        signature = signature if len(signature) <= 80 else f"{name}(...)"
        plain = [
            f"def {signature}",
            f"Write a function `{name}`.",
            f"Write a function to {words}",
            f"Write `{signature}`",
            f"How do I {words} in Python?",
        ]
        informed = [
            f"Write a function `{name}`: {sentence}",
            f"Write a Python function: {sentence}",
            f"Implement `{signature}`. {sentence}",
            sentence,
        ]
    return [rng.choice(plain), rng.choice(informed)] if sentence else [rng.choice(plain)]


def chat_pairs(text: str, rng: random.Random) -> list[tuple[str, str]]:
    """Return request/answer pairs for the functions and classes defined in a module."""
    pairs = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
        answer = textwrap.dedent("\n".join(lines))
        if not 60 <= len(answer) <= MAX_ANSWER_CHARS or node.name.startswith("__"):
            continue
        sentence = first_sentence(ast.get_docstring(node))
        pairs += [(request, answer) for request in requests_for(node, sentence, rng)]
    return pairs


def group_turns(pairs: list[tuple[str, str]], rng: random.Random) -> list[list[tuple[str, str]]]:
    """Deal pairs into chats, most of one turn and some of two or three."""
    rng.shuffle(pairs)
    chats = []
    while pairs:
        turns = rng.choice((1, 1, 1, 1, 2, 3))
        chats.append(pairs[:turns])
        pairs = pairs[turns:]
    return chats


def read_documents(seed: int = 0) -> tuple[Documents, Documents]:
    """Read the standard library; return its training and its validation documents."""
    root = Path(os.__file__).parent
    rng = random.Random(seed)
    train, validation = Documents(), Documents()
    for path in library_files(root):
        try:
            text = path.read_text("utf-8")
            pairs = chat_pairs(text, rng)
        except (UnicodeDecodeError, SyntaxError):
            continue  # a few fixtures are deliberately not valid UTF-8 Python
        if len(text) < 200:
            continue
        key = path.relative_to(root).as_posix().encode()
        side = validation if int(hashlib.sha256(key).hexdigest(), 16) % 20 == 0 else train
        side.source.append(text)
        side.chats += group_turns(pairs, rng)
    train.chats += [[pair] for pair in GREETINGS * GREETING_COPIES]
    # Neighbours in the token stream share a window, so they should not come from one module.
    rng.shuffle(train.source)
    rng.shuffle(train.chats)
    return train, validation


def chat_text(turns: list[tuple[str, str]]) -> str:
    """Render a chat exactly as CHAT_TEMPLATE does, without the leading BEGIN."""
    return "".join(f"{USER}{ask}{END}{ASSISTANT}{answer.strip()}{END}" for ask, answer in turns)


def train_tokenizer(documents: Documents, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the training documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents.source, trainer)
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[begin]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write the tokenizer files that transformers and fairy_compile read."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {
        "bos_token_id": tokenizer.token_to_id(BEGIN),
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(END),
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "max_new_tokens": 256,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


class Stream:
    """Documents as one token sequence, with the place where each document starts."""

    def __init__(self, tokenizer: Tokenizer, texts: list[str]) -> None:
        encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        self.tokens = torch.tensor([token for ids in encoded for token in ids])
        lengths = torch.tensor([0] + [len(ids) for ids in encoded[:-1]])
        self.starts = lengths.cumsum(0)

    def windows(self, first: torch.Tensor, length: int) -> torch.Tensor:
        """Return the windows of `length` tokens that begin at the positions `first`."""
        first = first.clamp(max=len(self.tokens) - length)
        return self.tokens[first[:, None] + torch.arange(length)]

    def anywhere(self, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Draw windows at any position."""
        first = torch.randint(len(self.tokens) - length, (count,), generator=generator)
        return self.windows(first, length)

    def at_starts(self, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Draw windows that begin with a document, as every prompt does at run time."""
        pick = torch.randint(len(self.starts), (count,), generator=generator)
        return self.windows(self.starts[pick], length)

    def head(self, count: int, length: int) -> torch.Tensor:
        """Return the first windows, one after another; a window's last token starts the next."""
        count = min(count, (len(self.tokens) - 1) // (length - 1))
        return self.windows(torch.arange(count) * (length - 1), length)


@dataclass
class Corpus:
    """Tokenizer and token streams of both sides of the split."""

    tokenizer: Tokenizer
    train_source: Stream
    train_chat: Stream
    valid_source: Stream
    valid_chat: Stream


def build_corpus(vocab_size: int, tokenizer: Tokenizer | None = None) -> Corpus:
    """Read the library, train the tokenizer (unless one is given) and encode everything."""
    train, validation = read_documents()
    tokenizer = tokenizer or train_tokenizer(train, vocab_size)

    def encode(texts: list[str]) -> Stream:
        return Stream(tokenizer, texts)

    return Corpus(
        tokenizer,
        encode([text + END for text in train.source]),
        encode([chat_text(chat) for chat in train.chats]),
        encode([text + END for text in validation.source]),
        encode([chat_text(chat) for chat in validation.chats]),
    )
