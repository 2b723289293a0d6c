"""Routers and routings: what is chosen, and how."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from cumoe.door.arrays import Kind, admit, admit_like, check_kind
from cumoe.door.checks import (
    FACTOR_DTYPES,
    FLOAT_DTYPES,
    ID_DTYPES,
    check_count,
    check_dtype,
    check_number,
    check_rank,
    check_shape,
    check_word,
    refuse,
)
from cumoe.door.factors import admit_factors, as_factors
from cumoe.door.streams import on_producers_stream

MAX_SLOTS = 2**31 - 1
"""num_tokens * top_k is counted in int32 on the device."""

SCORINGS = ("softmax", "sigmoid", "sqrt_softplus", "sparse_mixer")

GPU_MAX_EXPERTS = 1024
"""The routing and grouping kernels keep a counter or a key for each expert in shared memory."""


class Routing(NamedTuple):
    """Which experts a token goes to, and with what weight."""

    topk_ids: Any  # (num_tokens, top_k) int32; an id outside [0, num_experts) is a slot without an expert
    topk_weights: Any  # (num_tokens, top_k) float32


@dataclass(frozen=True, eq=False)
class Router:
    r"""How logits become experts and weights.

    With l the logits of one token (capped first: ``cap * tanh(l / cap)`` if `logit_softcap` is given)::

        s    = softmax(l) | sigmoid(l) | sqrt(softplus(l)) | see below   scoring
        c    = s + selection_bias                                        select_by="scores"
               l + selection_bias                                        select_by="logits"
        c    = dropped value outside the top_groups best of num_groups   groups of neighbouring experts
        ids  = the top_k largest c; ties go to the lower id; NaN ranks below everything
               expert_table[token id], whatever the logits are           expert_table
        w    = s[ids]; for softmax with select_by="logits": softmax(l[ids])
        w    = w / (||w||_p + eps), or w / max(||w||_p, eps)             renormalize
        w    = w * scale * expert_scale[ids]

    The selection bias moves the choice and never a weight. Ids chosen by logits are always distinct and in range.

    With scoring="sparse_mixer" (Phi-3.5-MoE) the experts are those of the largest logits, and each is weighed among its
    near rivals alone, so that most weights are exactly 1 and a row's weights do not sum to 1::

        w_j = exp(l_j) / sum of exp(l_e), e not chosen before j and (l_j - l_e) / max(|l_e|, l_j) <= 2 mixer_eps

    Parameters
    ----------
    top_k : int
        Experts a token, from 1 to num_experts.
    scoring : {"softmax", "sigmoid", "sqrt_softplus", "sparse_mixer"}
        "sparse_mixer" takes neither a selection bias, nor groups, nor `renormalize`, nor a table.
    select_by : {"scores", "logits"}
        "logits" with softmax is the softmax *after* the top-k (gpt-oss, Granite); Llama-4 is sigmoid by logits.
    renormalize : bool
        Divide the chosen weights by their norm.
    renormalize_eps : float
        eps above, not negative: 1e-20 in DeepSeek-V3, 1e-6 in LFM2. With 0 the ratio is exact also where all scores
        underflow.
    renormalize_eps_mode : {"add", "clamp"}
        Whether eps is added to the norm or bounds it from below (ERNIE-4.5).
    renormalize_order : {1, 2}
        p above; 2 is an option of DBRX.
    num_groups, top_groups : int
        Group-limited choice: experts are num_groups runs of equal length, of which the top_groups best remain.
    group_score : {"sum_top2", "max"}
        A group's score: the sum of its two largest c (DeepSeek-V3) or its largest (DeepSeek-V2).
    dropped_groups : {"minus_inf", "zero"}
        What experts of other groups are ranked with. "zero" lets them win against negative c, as A.X-K2 wants.
    selection_bias : (num_experts,) array, optional
        Added for the choice only. Converted to float32.
    scale : float
        Multiplies every weight (routed_scaling_factor). It never reaches a shared expert.
    logit_softcap : float, optional
        Positive.
    mixer_eps : float
        Of "sparse_mixer", not negative.
    expert_scale : (num_experts,) array, optional
        Multiplies the weight of each expert (Gemma-4). Converted to float32.
    expert_table : (vocab_size, top_k) array of an int dtype, optional
        The experts of every token id (the hash layers of DeepSeek-V4); their weights come from the logits. Converted to
        int32. A token id outside the table, and an entry that names no expert, is a slot without an expert: id -1,
        weight 0. Takes neither a selection bias nor groups.

    Raises
    ------
    TypeError, ValueError
        If a word is unknown, a number is out of range or not finite, top_groups > num_groups, the arrays disagree in
        library, device or length, num_groups does not divide their length, or options exclude each other.

    Notes
    -----
    Sources: the formulas follow the modules of transformers 5.17 (mixtral, qwen2_moe, llama4, deepseek_v2, deepseek_v3,
    deepseek_v4, gpt_oss, ernie4_5_moe, lfm2_moe, dbrx, gemma4, laguna, phimoe).
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid", "sqrt_softplus", "sparse_mixer"] = "softmax"
    select_by: Literal["scores", "logits"] = "scores"
    renormalize: bool = False
    renormalize_eps: float = 0.0
    renormalize_eps_mode: Literal["add", "clamp"] = "add"
    renormalize_order: Literal[1, 2] = 1
    num_groups: int = 1
    top_groups: int | None = None
    group_score: Literal["sum_top2", "max"] = "sum_top2"
    dropped_groups: Literal["minus_inf", "zero"] = "minus_inf"
    selection_bias: Any = None
    scale: float = 1.0
    logit_softcap: float | None = None
    expert_scale: Any = None
    mixer_eps: float = 0.01
    expert_table: Any = None

    def __post_init__(self) -> None:
        """Check everything that can be checked before logits are seen."""
        self._check(self.selection_bias, self.expert_scale, self.expert_table)

    @on_producers_stream
    def _check(self, *_: Any) -> None:
        plain: dict[str, Any] = {"top_k": check_count("top_k", self.top_k, 1)}
        check_word("scoring", self.scoring, SCORINGS)
        check_word("select_by", self.select_by, ("scores", "logits"))
        if not isinstance(self.renormalize, (bool, np.bool_)):
            raise TypeError(refuse("renormalize", "True or False", repr(self.renormalize)))
        plain["renormalize"] = bool(self.renormalize)
        plain["renormalize_eps"] = check_number("renormalize_eps", self.renormalize_eps, low=0.0)
        check_word("renormalize_eps_mode", self.renormalize_eps_mode, ("add", "clamp"))
        plain["renormalize_order"] = check_count("renormalize_order", self.renormalize_order, 1, 2)
        plain["num_groups"] = check_count("num_groups", self.num_groups, 1)
        if self.top_groups is not None:
            plain["top_groups"] = check_count("top_groups", self.top_groups, 1, self.num_groups, of=" (num_groups)")
        elif self.num_groups > 1:
            raise ValueError(refuse("top_groups", f"an int from 1 to {self.num_groups} (num_groups)", None))
        check_word("group_score", self.group_score, ("sum_top2", "max"))
        check_word("dropped_groups", self.dropped_groups, ("minus_inf", "zero"))
        plain["scale"] = check_number("scale", self.scale)
        if self.logit_softcap is not None:
            plain["logit_softcap"] = check_number("logit_softcap", self.logit_softcap, low=0.0, low_is_allowed=False)
        plain["mixer_eps"] = check_number("mixer_eps", self.mixer_eps, low=0.0)
        for name, value in plain.items():  # kernels take Python numbers, not NumPy scalars
            object.__setattr__(self, name, value)
        vectors: list[tuple[str, int, Kind]] = []
        for name in ("selection_bias", "expert_scale"):
            if getattr(self, name) is not None:
                vector, kind = admit(name, getattr(self, name))
                check_rank(name, vector, ("num_experts",))
                check_dtype(name, vector, FACTOR_DTYPES)
                object.__setattr__(self, name, as_factors(vector))
                vectors.append((name, vector.shape[0], kind))
        for name, length, kind in vectors:
            self.check_experts(length, name)
            first, first_length, first_kind = vectors[0]
            check_kind(name, kind, first_kind, first)
            if length != first_length:
                raise ValueError(refuse(name, f"length {first_length}, like {first}", f"length {length}"))
        own_kind = vectors[0][2] if vectors else None
        if self.expert_table is not None:
            table, own_kind = self._admit_table(own_kind)
            object.__setattr__(self, "expert_table", table)
        object.__setattr__(self, "_kind", own_kind)
        self._check_exclusions()

    def _admit_table(self, kind: Kind | None) -> tuple[Any, Kind]:
        table, own_kind = admit("expert_table", self.expert_table)
        check_rank("expert_table", table, ("vocab_size", "top_k"))
        check_shape("expert_table", table, {"vocab_size": table.shape[0], "top_k": self.top_k})
        check_dtype("expert_table", table, ID_DTYPES)
        if kind is not None:
            check_kind("expert_table", own_kind, kind, "selection_bias or expert_scale")
        return as_int32_ids(table), own_kind

    def _check_exclusions(self) -> None:
        """Raise ValueError where two options contradict each other."""
        by_table, by_mixer = self.expert_table is not None, self.scoring == "sparse_mixer"
        for name in ("expert_table",) * by_table + ("scoring='sparse_mixer'",) * by_mixer:
            if self.selection_bias is not None or self.num_groups > 1:
                raise ValueError(refuse(name, "neither selection_bias nor num_groups beside it", "one of them"))
        if by_mixer and (self.renormalize or by_table):
            raise ValueError(refuse("scoring='sparse_mixer'", "neither renormalize nor expert_table", "one of them"))

    @property
    def kind(self) -> Kind:
        """Where the arrays live; meaningless without any."""
        return self._kind  # type: ignore[attr-defined]

    def check_experts(self, num_experts: int, name: str) -> None:
        """Raise ValueError unless this router can serve `num_experts`, counted in the argument `name`."""
        if self.top_k > num_experts:
            raise ValueError(refuse("top_k", f"an int from 1 to {num_experts} (num_experts of {name})", self.top_k))
        if num_experts % self.num_groups:
            raise ValueError(refuse("num_groups", f"a divisor of num_experts={num_experts}", self.num_groups))
        kept = num_experts // self.num_groups * (self.top_groups or self.num_groups)
        if self.top_k > kept:
            raise ValueError(
                refuse("top_k", f"at most {kept}, the experts of top_groups={self.top_groups}", self.top_k)
            )


def check_logits(name: str, logits: Any, kind: Kind, router: Router) -> None:
    """Raise unless `router` can serve the admitted `logits`."""
    check_dtype(name, logits, FLOAT_DTYPES)
    check_rank(name, logits, ("num_tokens", "num_experts"))
    num_tokens, num_experts = logits.shape
    check_count("num_experts", num_experts, 1)
    check_router(router, num_experts, kind, name)
    check_slots(num_tokens, router.top_k)


def check_router(router: Router, num_experts: int, kind: Kind, owner: str) -> None:
    """Raise unless `router` fits `num_experts` experts of the given kind."""
    router.check_experts(num_experts, owner)
    if kind.on_gpu:
        check_count("num_experts", num_experts, 1, GPU_MAX_EXPERTS, of=" on a GPU")
    for name in ("selection_bias", "expert_scale"):
        vector = getattr(router, name)
        if vector is not None:
            check_shape(name, vector, {"num_experts": num_experts})
            check_kind(name, router.kind, kind, owner)
    if router.expert_table is not None:
        check_kind("expert_table", router.kind, kind, owner)


def admit_input_ids(input_ids: Any, router: Router, kind: Kind, owner: str, num_tokens: int) -> Any:
    """Return contiguous int32 token ids where `router` has an expert_table, else None; raise unless they fit."""
    if (input_ids is None) != (router.expert_table is None):
        wanted = "None, since the router has no expert_table" if router.expert_table is None else "an array"
        raise ValueError(refuse("input_ids", wanted, "None" if input_ids is None else "an array"))
    if input_ids is None:
        return None
    ids = admit_like("input_ids", input_ids, kind, owner)
    check_dtype("input_ids", ids, ID_DTYPES)
    check_shape("input_ids", ids, {"num_tokens": num_tokens})
    return as_int32_ids(ids)


def check_slots(num_tokens: int, top_k: int) -> None:
    """Raise ValueError if the slots cannot be counted in int32."""
    if num_tokens * top_k > MAX_SLOTS:
        raise ValueError(refuse("num_tokens", f"num_tokens * top_k below 2^31 with top_k={top_k}", num_tokens))


def admit_routing(routing: Any, kind: Kind, owner: str, num_tokens: int) -> Routing:
    """View a Routing, or a pair (topk_ids, topk_weights), as int32 ids and float32 weights of one kind.

    Ids that do not fit int32 name no expert; weights in another float type are converted, never reinterpreted.
    """
    if not isinstance(routing, Sequence) or len(routing) != 2:
        raise TypeError(refuse("routing", "a cumoe.Routing or a pair (topk_ids, topk_weights)", type(routing).__name__))
    ids = admit_like("topk_ids", routing[0], kind, owner)
    check_ids(ids)
    axes = {"num_tokens": num_tokens, "top_k": ids.shape[1]}
    check_shape("topk_ids", ids, axes)
    weights = admit_factors("topk_weights", routing[1], axes, kind, owner)
    return Routing(as_int32_ids(ids), weights)


def check_ids(ids: Any) -> None:
    """Raise unless `ids` can be expert ids."""
    check_dtype("topk_ids", ids, ID_DTYPES)
    check_rank("topk_ids", ids, ("num_tokens", "top_k"))
    check_count("top_k", ids.shape[1], 1)
    check_slots(*ids.shape)


def as_int32_ids(ids: Any) -> Any:
    """Return contiguous int32 ids; what does not fit is clipped to a number that names no expert."""
    if ids.dtype.itemsize >= 4 and ids.dtype != np.int32:
        ids = ids.clip(-1 if ids.dtype.kind == "i" else 0, 2**31 - 1)
    return ids.astype(np.int32, order="C", copy=False)
