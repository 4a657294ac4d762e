# Written by tools/tangle.py from book/17_chat.ipynb: change it there.
"""Chat: conversations with marked roles, and a model that learns to answer."""

import copy
import json
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.data import Batch, TokenData
from glassgpt.generation import stream_text
from glassgpt.gpt import GPT
from glassgpt.tokens import BPETokenizer, CharTokenizer, Tokenizer
from glassgpt.training import Loss, count_targets, mean_loss

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Template:
    """How a conversation is written: what stands around the words of each turn.

    before: what opens each role's turns. stop: the token that ends a turn. after: what
    follows it. default_system: a system line for conversations that begin without one.

    Book: 17_chat.html#roles-nobody-can-forge
    """

    before: Mapping[str, str]
    stop: str
    after: str = ""
    default_system: str | None = None


GLASS = Template({role: f"<|{role}|>" for role in ROLES}, "<|end|>")
CHATML = Template(
    {role: f"<|im_start|>{role}\n" for role in ROLES},
    stop="<|im_end|>",
    after="\n",
    default_system="You are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face",
)


def template_of(tokenizer: Any) -> Template:
    """The template whose special tokens a tokenizer has.

    Raises ValueError, with advice, where it has those of none.

    Book: 17_chat.html#roles-nobody-can-forge
    """
    known = tokenizer.special_tokens.keys()
    if {GLASS.stop, *GLASS.before.values()} <= known:
        return GLASS
    if {"<|im_start|>", CHATML.stop} <= known:
        return CHATML
    raise ValueError(
        "this model knows no roles: give it roles with glassgpt.add_roles, "
        "and train it on conversations"
    )


Conversation = Sequence[Mapping[str, str]]  # turns {"role": ..., "content": ...}
Rendered = tuple[list[int], list[bool]]  # ids, and which of them are learned


def render(conversation: Conversation, tokenizer: Any, reply: bool = False) -> Rendered:
    """A conversation as ids, and a mask: True for answers and the token that ends them.

    conversation: turns {"role": "system", "user" or "assistant", "content": text}.
    tokenizer: one with the special tokens of a `Template`. reply: end with the role
    token after which the assistant answers. No content becomes a special token.
    Raises ValueError for any other turn, and for none at all.

    Book: 17_chat.html#roles-nobody-can-forge
    """
    template = template_of(tokenizer)
    ids: list[int] = []
    mask: list[bool] = []

    def write(text: str, special: bool, learn: bool) -> None:
        new = tokenizer.encode(text, allow_special=special)
        ids.extend(new)
        mask.extend([learn] * len(new))

    for role, content in _turns(conversation, template):
        answer = role == "assistant"
        write(template.before[role], special=True, learn=False)
        write(content, special=False, learn=answer)
        write(template.stop, special=True, learn=answer)
        write(template.after, special=True, learn=False)
    if reply:
        write(template.before["assistant"], special=True, learn=False)
    return ids, mask


def _turns(conversation: Conversation, template: Template) -> list[tuple[str, str]]:
    """The (role, content) of each turn, the template's own system line included."""
    turns = []
    for turn in conversation:
        match turn:
            case {"role": str(role), "content": str(content)} if role in ROLES:
                turns.append((role, content))
            case _:
                raise ValueError(
                    'a turn is {"role": "system", "user" or "assistant", '
                    f'"content": text}}, not {turn!r:.80}'
                )
    if not turns:
        raise ValueError("a conversation needs at least one turn")
    if template.default_system is not None and turns[0][0] != "system":
        turns.insert(0, ("system", template.default_system))
    return turns


def stream_answer(
    model: GPT,
    tokenizer: Any,
    conversation: Conversation,
    max_new_tokens: int = 200,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Answer the last turn of a conversation, in printable pieces as they come.

    An answer ends with the first special token, or where the context is full.
    The settings: as in `Sampling`. Raises ValueError for what `render` and `stream`
    refuse, and where the conversation leaves no room.

    Book: 17_chat.html#talking
    """
    ids, _ = render(conversation, tokenizer, reply=True)
    room = model.config.context - len(ids)
    if room < 1:
        raise ValueError(f"a talk of {len(ids)} tokens leaves no room for an answer")
    max_new_tokens = min(max_new_tokens, room)
    stop = tokenizer.special_tokens.values()
    return stream_text(
        model,
        tokenizer,
        ids,
        max_new_tokens,
        stop,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )


def fit_history(
    conversation: Conversation, tokenizer: Any, room: int
) -> list[Mapping[str, str]]:
    """A conversation without its oldest turns, so that it takes at most `room` tokens.

    Each question goes with its answer. A system line at the beginning stays, and so
    does the last question. Raises ValueError where that isn't enough, and for what
    `render` refuses.

    Book: 17_chat.html#talking
    """
    turns = list(conversation)
    oldest = 1 if turns and turns[0]["role"] == "system" else 0
    while True:
        ids, _ = render(turns, tokenizer, reply=True)
        if len(ids) <= room:
            return turns
        if len(turns) - oldest < 3:  # nothing but the last question
            raise ValueError(
                f"the last message (system line included) takes {len(ids)} tokens, "
                f"more than the {room} there are: shorten it"
            )
        del turns[oldest : oldest + 2]


END_OF_TEXT = "<|endoftext|>"  # between conversations


def add_roles(model: GPT, tokenizer: Tokenizer) -> tuple[GPT, Tokenizer]:
    """A copy of a model, and a tokenizer, that have the special tokens of a chat.

    What they have already stays, and so do all ids. A new row in the tables, or one to
    spare, is the mean of the others. A tokenizer with ChatML's tokens gets ours, too,
    and its conversations are from then on written with them. Source: Hewitt (2021).
    Raises ValueError for a tokenizer of another package.

    Book: 17_chat.html#new-rows-in-the-table
    """
    roles = [END_OF_TEXT, *GLASS.before.values(), GLASS.stop]
    names = dict.fromkeys([*tokenizer.special_tokens, *roles])  # each once, in order
    larger: Tokenizer
    if isinstance(tokenizer, BPETokenizer):
        larger = BPETokenizer(tokenizer.merges, names)
    elif isinstance(tokenizer, CharTokenizer):
        larger = CharTokenizer(tokenizer._symbols, names)
    else:
        raise ValueError(f"a {type(tokenizer).__name__} can't gain special tokens")
    known = tokenizer.vocab_size
    size = max(larger.vocab_size, model.config.vocab_size)
    model = copy.deepcopy(model)
    tables: list[Any] = [model.tokens, model.head]
    for layer in tables:
        rows = layer.weight.detach()[:known]
        new = rows.mean(dim=0).expand(size - known, -1)
        layer.weight = nn.Parameter(torch.cat((rows, new)))
    if model.config.tied:
        model.head.weight = model.tokens.weight
    model.head.out_features = size
    model.config = replace(model.config, vocab_size=size)
    return model, larger


IGNORED = -100  # no target: what `cross_entropy` leaves out


def pack(conversations: Iterable[Rendered], context: int, separator: int) -> Batch:
    """Put conversations side by side into rows: ids and targets, (N, context) each.

    conversations: what `render` returns. separator: the id between them, and of what
    stays empty. Every target is there once, predicted from the token before it; all
    others are -100. A conversation longer than a row is cut. Best fit, longest first.
    Raises ValueError for a mask that is shorter or longer than its ids.

    Book: 17_chat.html#packing
    """

    def room(row: list[tuple[int, int]]) -> int:
        return context - len(row)

    end = (separator, IGNORED)
    pieces = []
    for ids, mask in conversations:
        pairs = [
            (token, target if learn else IGNORED)
            for token, target, learn in zip(ids[:-1], ids[1:], mask[1:], strict=True)
        ]
        for start in range(0, len(pairs), context - 1):
            pieces.append([*pairs[start : start + context - 1], end])
    rows: list[list[tuple[int, int]]] = []  # of (id, target), the fullest first
    for piece in sorted(pieces, key=len, reverse=True):
        place = bisect_left(rows, len(piece), key=room)
        row = rows.pop(place) if place < len(rows) else []
        insort(rows, row + piece, key=room)
    filled = [row + [end] * room(row) for row in rows]
    table = torch.tensor(filled, dtype=torch.long).view(len(rows), context, 2)
    return table[..., 0], table[..., 1]


def separate(ids: Tensor, separator: int) -> tuple[Tensor, Tensor]:
    """Positions (B, T) and attention mask (B, 1, T, T) for packed ids (B, T).

    A position sees itself and what came before in its own conversation, where positions
    count from 0. separator: the id in which every conversation ends.

    Book: 17_chat.html#conversations-that-don-t-see-each-other
    """
    column = torch.arange(ids.shape[1], device=ids.device)
    begins = F.pad(ids[:, :-1] == separator, (1, 0))  # (1, 0) puts a False in front
    first = torch.where(begins, column, 0).cummax(dim=1).values
    same = first[:, :, None] == first[:, None, :]  # (B, T, T)
    return column - first, same.tril()[:, None]


def chat_loss(model: GPT, separator: int) -> Loss:
    """The mean cross-entropy of packed ids and targets (B, T), in nats a target.

    separator: the id between conversations, which don't see each other. Without any
    target the loss is 0. For `Trainer` and `evaluate`. Batches may lie on any device.

    Book: 17_chat.html#the-loss-and-its-weight
    """
    device = next(model.parameters()).device

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        ids = ids.to(device)
        logits = model.head(model.hidden_states(ids, *separate(ids, separator)))
        return mean_loss(logits, targets.to(device))

    return loss


class Packed:
    """Rows of packed conversations, in the place of `Tokens` for a `Trainer`.

    inputs, targets: what `pack` returned. Its length is the number of targets.

    Book: 17_chat.html#the-loss-and-its-weight
    """

    def __init__(self, inputs: Tensor, targets: Tensor):
        self.inputs = inputs
        self.targets = targets
        self.characters = None  # so losses are by token only

    def __len__(self) -> int:
        return count_targets(self.targets)

    def starts(self, context: int) -> int:
        """How many rows there are.

        Raises ValueError for rows longer than the context, or without any target.
        """
        length = self.inputs.shape[1]
        if length > context:
            raise ValueError(
                f"rows of {length} tokens don't fit a context of {context}"
            )
        if len(self) == 0:
            raise ValueError("no answer to learn from: is there an assistant?")
        return len(self.inputs)

    def random_batch(
        self, batch_size: int, context: int, seed: int | Sequence[int]
    ) -> Batch:
        """Inputs and targets (B, T), by (seed, step): every row once an epoch.

        A seed alone means step 0.
        """
        step = 0
        if not isinstance(seed, int):
            seed, step = seed
        count = len(self.inputs)
        epoch, place = divmod(step * batch_size, count)
        order: list[int] = []  # of this epoch, and of those in which the batch ends
        while len(order) < place + batch_size:
            random = np.random.default_rng((seed, epoch))
            order.extend(random.permutation(count).tolist())
            epoch += 1
        rows = order[place : place + batch_size]
        return self.inputs[rows], self.targets[rows]

    def fixed_batches(
        self, crops: int, context: int, batch_size: int
    ) -> Iterator[Batch]:
        """At most `crops` rows, the same every time, in batches.

        They lie at equal distances, from the first to the last.
        """
        last = len(self.inputs) - 1
        rows = np.linspace(0, last, min(crops, last + 1)).astype(np.int64)
        for batch in torch.from_numpy(rows).split(batch_size):
            yield self.inputs[batch], self.targets[batch]


def pack_data(
    train: Iterable[Conversation],
    validation: Iterable[Conversation],
    tokenizer: Any,
    context: int,
) -> TokenData:
    """Conversations to learn from, rendered and packed, for a `Trainer`.

    Train with `chat_loss`. Raises ValueError for what `render` refuses.

    Book: 17_chat.html#the-loss-and-its-weight
    """
    separator = tokenizer.special_tokens[END_OF_TEXT]

    def packed(conversations: Iterable[Conversation]) -> Packed:
        rendered = [render(talk, tokenizer) for talk in conversations]
        return Packed(*pack(rendered, context, separator))

    return TokenData(packed(train), packed(validation), tokenizer.vocab_size)


_JINJA = """\
{%- for turn in messages -%}
{%- if turn.role not in before or turn.content is not string -%}
{{- raise_exception('a turn has a known role, and a text') -}}
{%- endif -%}
{%- if loop.first and turn.role != 'system' -%}{{- default_system -}}{%- endif -%}
{{- before[turn.role] -}}
{%- if turn.role == 'assistant' -%}
{%- generation -%}{{- turn.content + stop -}}{%- endgeneration -%}
{%- else -%}
{{- turn.content + stop -}}
{%- endif -%}
{{- after -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- before.assistant -}}{%- endif -%}"""


def to_jinja(template: Template) -> str:
    """A template as `transformers` has it, a program in Jinja.

    Between {% generation %} and {% endgeneration %} stands what is learned. Other roles
    and contents that aren't text raise an error. A content that spells a special token
    becomes one there.

    Book: 17_chat.html#in-the-usual-stack
    """
    default = ""
    if template.default_system is not None:
        opening = template.before["system"]
        default = opening + template.default_system + template.stop + template.after
    lines = [
        f"{{%- set before = {json.dumps(dict(template.before))} -%}}",
        f"{{%- set stop = {json.dumps(template.stop)} -%}}",
        f"{{%- set after = {json.dumps(template.after)} -%}}",
        f"{{%- set default_system = {json.dumps(default)} -%}}",
        _JINJA,
    ]
    return "\n".join(lines)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The files of a tokenizer in a model's folder: their names, and what they hold.

    tokenizer.json, and where there are roles chat_template.jinja, with which
    `transformers` gives the ids and the assistant's mask of `render`, as long as no
    content spells a special token. (With ChatML, none may begin with white space.)

    Book: 17_chat.html#in-the-usual-stack
    """
    files = {"tokenizer.json": tokenizer.to_json()}
    try:
        template = template_of(tokenizer)
    except ValueError:  # no roles, no template
        return files
    files["chat_template.jinja"] = to_jinja(template)
    return files
