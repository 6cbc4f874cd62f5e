"""The key maps: what each source calls a weight, and what `training.models.dit.DiT` does.

A rule is a pattern of their name, our name, and how several of theirs become one of ours. Every key of theirs must meet
a rule; that none of ours is missing shows when the weights are put into the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saccade.errors import InvalidInput, ModelError
from training.importers.reading import listed

Kind = Literal["meta-dit", "diffusers-dit", "dit-moe", "generalist"]
Join = Literal["own", "stack", "cat", "copies", "patches", "drop"]
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Rule:
    r"""`theirs`: a pattern with at most one group `place`, the part's number. `ours`: as for `re.sub`.

    `join`: own (one key, one weight), stack (parts on a new first axis), cat (along the first), copies (all equal, one
    is kept), patches (stack, each convolution [D, C, p, p] turned into the matrix [C p p, D]), drop (computed by us).
    """

    theirs: str
    ours: str = r"\g<0>"
    join: Join = "own"


_N = r"\d{1,4}"
_VALUES = r"(?P<value>weight|bias)"
POSITIONS = Rule(r"pos_embed", join="drop")
OUTSIDE = (
    Rule(rf"t_embedder\.mlp\.[02]\.{_VALUES}"),
    Rule(r"y_embedder\.embedding_table\.weight"),
    Rule(rf"blocks\.{_N}\.(attn\.(qkv|proj)|adaLN_modulation\.1)\.{_VALUES}"),
    Rule(rf"final_layer\.(linear|adaLN_modulation\.1)\.{_VALUES}"),
)
ROUTING_TABLE = Rule(rf"blocks\.{_N}\.routing\._unit_mapping", join="drop")
"""DTR's masks, the same in every block; `meta_dit.routing_of` reads them."""
ONE_INPUT = Rule(rf"x_embedder\.proj\.{_VALUES}")
DENSE = Rule(rf"blocks\.{_N}\.mlp\.fc[12]\.{_VALUES}")
_EXPERT = r"(?P<block>blocks\.\d{1,4}\.moe\.experts)\.(?P<place>\d{1,4})"
_BLOCK = r"transformer_blocks\.(?P<block>\d{1,4})"
_COPY = r"transformer_blocks\.(?P<place>\d{1,4})\.norm1\.emb"

RULES: dict[Kind, tuple[Rule, ...]] = {
    "meta-dit": (POSITIONS, ROUTING_TABLE, ONE_INPUT, *OUTSIDE, DENSE),
    "dit-moe": (
        POSITIONS,
        ONE_INPUT,
        *OUTSIDE,
        Rule(r"blocks\.\d{1,4}\.moe\.gate\.weight"),
        Rule(r"blocks\.\d{1,4}\.moe\.shared_experts\.(gate|up|down)_proj\.weight"),
        Rule(rf"{_EXPERT}\.(?P<layer>(gate|up|down)_proj)\.weight", r"\g<block>.\g<layer>.weight", "stack"),
    ),
    "generalist": (
        POSITIONS,
        *OUTSIDE,
        Rule(r"blocks\.\d{1,4}\.moe\.gate\.weight"),
        Rule(rf"{_EXPERT}\.(?P<layer>fc[12])\.{_VALUES}", r"\g<block>.\g<layer>.\g<value>", "stack"),
        Rule(r"x_embedder\.proj\.conv_in_(?P<place>\d{1,4})\.weight", "x_embedder.weight", "patches"),
        Rule(r"x_embedder\.proj\.conv_in_(?P<place>\d{1,4})\.bias", "x_embedder.bias", "stack"),
    ),
    "diffusers-dit": (
        Rule(r"pos_embed\.pos_embed", join="drop"),
        Rule(rf"pos_embed\.proj\.{_VALUES}", r"x_embedder.proj.\g<value>"),
        Rule(rf"{_COPY}\.timestep_embedder\.linear_1\.{_VALUES}", r"t_embedder.mlp.0.\g<value>", "copies"),
        Rule(rf"{_COPY}\.timestep_embedder\.linear_2\.{_VALUES}", r"t_embedder.mlp.2.\g<value>", "copies"),
        Rule(rf"{_COPY}\.class_embedder\.embedding_table\.weight", "y_embedder.embedding_table.weight", "copies"),
        Rule(rf"{_BLOCK}\.norm1\.linear\.{_VALUES}", r"blocks.\g<block>.adaLN_modulation.1.\g<value>"),
        Rule(rf"{_BLOCK}\.attn1\.to_(?P<place>[qkv])\.{_VALUES}", r"blocks.\g<block>.attn.qkv.\g<value>", "cat"),
        Rule(rf"{_BLOCK}\.attn1\.to_out\.0\.{_VALUES}", r"blocks.\g<block>.attn.proj.\g<value>"),
        Rule(rf"{_BLOCK}\.ff\.net\.0\.proj\.{_VALUES}", r"blocks.\g<block>.mlp.fc1.\g<value>"),
        Rule(rf"{_BLOCK}\.ff\.net\.2\.{_VALUES}", r"blocks.\g<block>.mlp.fc2.\g<value>"),
        Rule(rf"proj_out_1\.{_VALUES}", r"final_layer.adaLN_modulation.1.\g<value>"),
        Rule(rf"proj_out_2\.{_VALUES}", r"final_layer.linear.\g<value>"),
    ),
}
MARKS: dict[Kind, str] = {
    "diffusers-dit": r"transformer_blocks\.\d{1,4}\.norm1\.emb\.",
    "generalist": r"x_embedder\.proj\.conv_in_\d{1,4}\.",
    "dit-moe": r"blocks\.\d{1,4}\.moe\.experts\.\d{1,4}\.gate_proj\.",
    "meta-dit": r"blocks\.\d{1,4}\.mlp\.fc1\.",
}
"""What only files of a kind have."""


def detect(state: Mapping[str, Tensor]) -> Kind:
    """The kind whose marks are among the keys. Raises ModelError for none."""
    for kind, mark in MARKS.items():
        if any(re.match(mark, key) for key in state):
            return kind
    raise ModelError(f"these keys are of no kind that is known ({', '.join(MARKS)}): {listed(state)}")


def to_ours(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their weights under our names. Raises ModelError that lists the keys that no rule knows, parts that are missing
    and copies that differ; InvalidInput for an unknown kind."""
    if kind not in RULES:
        raise InvalidInput(f"kind must be one of {', '.join(RULES)}, not {kind}", param="kind")
    found: dict[str, tuple[Rule, dict[str, Tensor]]] = {}
    unknown = []
    for key, value in state.items():
        for rule in RULES[kind]:
            if match := re.fullmatch(rule.theirs, key):
                place = match.groupdict().get("place") or "0"
                found.setdefault(match.expand(rule.ours), (rule, {}))[1][place] = value
                break
        else:
            unknown.append(key)
    if unknown:
        raise ModelError(f"{kind} has no such keys: {listed(unknown)}")
    return {name: _joined(name, rule, parts) for name, (rule, parts) in found.items() if rule.join != "drop"}


def _joined(name: str, rule: Rule, parts: Mapping[str, Tensor]) -> Tensor:
    values = _in_order(name, rule.join, parts)
    if len({value.shape for value in values}) > 1:
        raise ModelError(f"the parts of {name} differ in shape: {listed({str(list(v.shape)) for v in values})}")
    match rule.join:
        case "stack":
            return torch.stack(values)
        case "patches":
            return torch.stack([value.flatten(1).T for value in values])
        case "cat":
            return torch.cat(values)
        case "copies" if any((value - values[0]).abs().max() > TOLERANCE for value in values):
            raise ModelError(f"the blocks' copies of {name} differ: a transformer of ours has one for all")
    return values[0]


def _in_order(name: str, join: Join, parts: Mapping[str, Tensor]) -> list[Tensor]:
    """The parts by their numbers, which must be without a gap, or q, k, v."""
    if join == "cat":
        wanted = ["q", "k", "v"]
    elif join in ("stack", "patches"):
        first = min(map(int, parts))
        wanted = [str(first + offset) for offset in range(len(parts))]
    else:
        return list(parts.values())
    if missing := [place for place in wanted if place not in parts]:
        raise ModelError(f"of {name} the parts {', '.join(missing)} are missing")
    return [parts[place] for place in wanted]
