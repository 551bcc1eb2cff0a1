"""The value tracker: a baseline per prompt, learnt from one rollout per visit.

State of a prompt: Beta(a, b), v = a / (a + b). A visit with reward r: a <- rho*a + r, b <- rho*b + (1 - r).
The further the policy has moved since the last visit, the smaller rho and the faster the forgetting (SPO, arXiv 2509.13232).
The MSSR authors use the same tracker with other rules for start and rho (arXiv 2512.18215): preset `reference`.

First the pure functions, on floats or tensors of any one shape; then the state.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mssr.errors import UserError

REFERENCE_KL = 0.01  # the authors' threshold, above which their rho drops to rho_min
KL_WINDOW = 10  # batches in the mean of recent KLs; the 20 of the authors' configuration never reaches their tracker

Number = float | Tensor


def beta_value(a: Number, b: Number) -> Number:
    """Return v = a / (a + b), the expected reward."""
    return a / (a + b)


def beta_update(a: Number, b: Number, reward: Number, rho: Number) -> tuple[Number, Number]:
    """Return (a, b) after a visit: the past is scaled by rho, the reward in [0, 1] counts in full."""
    return rho * a + reward, rho * b + (1 - reward)


def smoothed_start(successes: Number, trials: Number, n0: float) -> tuple[Number, Number]:
    """Return (a, b) with a + b = n0 under Jeffreys' prior, which adds half a success and half a failure.

    So v is never 0 or 1 (from exactly 1 it would take 6-7 failures in a row to fall below 0.5). Without trials v = 0.5.
    """
    return n0 * (successes + 0.5) / (trials + 1), n0 * (trials - successes + 0.5) / (trials + 1)


def rho_from_drift(drift: Tensor, half_life: float, rho_min: float, rho_max: float) -> Tensor:
    """Return clip(2^(-D / half_life), rho_min, rho_max), float64, in the shape of `drift`.

    SPO's rule (arXiv 2509.13232), as its recipe implements it.
    """
    return torch.exp2(-drift.double() / half_life).clamp(rho_min, rho_max)


def reference_rho(kl: Number, rho_min: float, rho_max: float) -> Tensor:
    """Return the MSSR authors' rho, float64: rho_min for K > 0.01; below, rho *rises* with K. K >= 0.

    K = 0 -> .875, .005 -> .9175, .0099 -> .95915, .01 -> .96, .0101 -> .875: a sawtooth, kept for parity only.
    """
    kl = torch.as_tensor(kl, dtype=torch.float64)
    rising = rho_min + (rho_max - rho_min) * kl / REFERENCE_KL
    return torch.where(kl > REFERENCE_KL, rho_min, rising)


def response_drift(current_logp: Tensor, sampled_logp: Tensor, mask: Tensor) -> Tensor:
    """Return D, [B] float: mean over a response's tokens of |current log-prob - log-prob at sampling|, in nats.

    0 for a row without tokens.

    current_logp: [B, R] float, previous responses under the current policy, at the sampling temperature.
    sampled_logp: [B, R] float, the same tokens at sampling.
    mask: [B, R] bool, True at response tokens; other values are ignored, even NaN.
    """
    difference = (current_logp - sampled_logp).abs().masked_fill(~mask, 0.0)
    return difference.sum(1) / mask.sum(1).clamp(min=1)


def reference_kl(old_logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """Return the k3 estimate of KL(policy || reference), [B] float, in nats per token; 0 for a row without tokens.

    The MSSR authors' rho uses it, clamped per token to 10 as in their code. `ValueTracker.observe_kl` takes its mean over
    the batch (their code also counts padding).

    old_logp: [B, R] float, under the policy before the step's updates.
    ref_logp: [B, R] float, under the frozen reference.
    mask: [B, R] bool, True at response tokens; other values are ignored, even NaN.
    """
    log_ratio = ref_logp - old_logp
    k3 = (log_ratio.expm1() - log_ratio).clamp(max=10).masked_fill(~mask, 0.0)
    return k3.sum(1) / mask.sum(1).clamp(min=1)


class PreviousResponse(NamedTuple):
    """A prompt's last response, on which drift is measured.

    token_ids: [R] int32, half the memory of int64; call .long() before use.
    logp: [R] float32, log-probs at sampling.
    """

    token_ids: Tensor
    logp: Tensor


class TrackerSettings(Protocol):
    """Settings of `algorithm.tracker`, described in `mssr.config.TrackerConfig`."""

    preset: str
    rho_min: float
    rho_max: float
    half_life: float
    drift: str


class ValueTracker:
    """Beta(a, b) of every prompt by content hash, so that rows may be added, removed or reordered between runs.

    Read `values` for a batch before `update` with its rewards, so that no reward is part of its own baseline.

        value = tracker.values(keys)
        advantage = single_rollout(Outcomes(reward, success, graded, value, lengths, group))
        tracker.update(keys, success, tracker.rho(drift))

    An unseen prompt has a = b = N0 / 2, v = 0.5, N0 = 1 / (1 - rho_min). a and b are float64. Every rank holds the whole
    tracker and updates it with the batch of all ranks, so that all copies stay equal.
    """

    def __init__(self, config: TrackerSettings) -> None:
        self.config = config
        self.n0 = 1 / (1 - config.rho_min)
        self._beta: dict[str, tuple[float, float]] = {}
        self._responses: dict[str, PreviousResponse] = {}
        self._recent_kl: deque[float] = deque(maxlen=KL_WINDOW)

    @property
    def wants_responses(self) -> bool:
        """Whether rho needs each prompt's previous response (`remember`, `previous`)."""
        return self.config.preset == "default" and self.config.drift == "prompt"

    def values(self, keys: Sequence[str]) -> Tensor:
        """Return the current baseline of each prompt, [B] float32 on the CPU."""
        return torch.tensor([beta_value(*self._state(key)) for key in keys], dtype=torch.float32)

    def initialise(self, keys: Sequence[str], rewards: Tensor) -> None:
        """Set the state of prompts from rollouts made before training.

        Default: `smoothed_start`. Reference: a = N0 * mean, b = N0 * (1 - mean), exactly 0 or 1 after one rollout.

        keys: [B], one per rollout, in any order. All rollouts of a key must be in the same call.
        rewards: [B] in [0, 1].

        Raises:
            UserError: a reward is not in [0, 1]; nothing changes.
        """
        rewards_of: dict[str, list[float]] = {}
        for key, reward in zip(keys, _checked_rewards(keys, rewards)):
            rewards_of.setdefault(key, []).append(reward)
        for key, known in rewards_of.items():
            self._beta[key] = self._start(sum(known), len(known))

    def update(self, keys: Sequence[str], rewards: Tensor, rho: Number) -> None:
        """Count one visit per row, in order; a key that occurs twice is updated twice.

        Default: the reward as it is. Reference: 1 for a reward above 0.5, else 0.

        keys: [B].
        rewards: [B] in [0, 1].
        rho: from `rho()`; [B] or a scalar.

        Raises:
            UserError: a reward is not in [0, 1]; nothing changes.
        """
        rewards = _checked_rewards(keys, rewards)
        if self.config.preset == "reference":
            rewards = [float(reward > 0.5) for reward in rewards]
        rho = torch.as_tensor(rho, dtype=torch.float64).expand(len(keys))
        if not ((rho > 0) & (rho <= 1)).all():  # NaN log-probs give a NaN drift, and so a NaN rho
            raise ValueError(f"rho must be in (0, 1], got {rho.tolist()}")
        for key, reward, row_rho in zip(keys, rewards, rho.tolist()):
            self._beta[key] = beta_update(*self._state(key), reward, row_rho)

    def rho(self, drift: Tensor | None = None) -> Tensor:
        """Return float64 forgetting factors for `update`.

        Default preset: `rho_from_drift`. Reference: `reference_rho` of the mean of recent KLs, whatever the drift; before
        the first KL, (rho_min + rho_max) / 2.

        drift: [B] from `response_drift`, or 0-d (the batch's mean); 0 on a prompt's first visit. None: 0 for all.
        """
        config = self.config
        if config.preset == "reference":
            if not self._recent_kl:
                return torch.tensor((config.rho_min + config.rho_max) / 2, dtype=torch.float64)
            mean = sum(self._recent_kl) / len(self._recent_kl)
            return reference_rho(mean, config.rho_min, config.rho_max)
        drift = torch.zeros(()) if drift is None else drift
        return rho_from_drift(drift, config.half_life, config.rho_min, config.rho_max)

    def observe_kl(self, kl: float) -> None:
        """Add a batch's mean KL to the frozen reference; the reference preset's K is the mean of the last KL_WINDOW."""
        self._recent_kl.append(float(kl))

    def remember(self, keys: Sequence[str], responses: Sequence[PreviousResponse]) -> None:
        """Keep each prompt's response for its next visit, as a compact copy on the CPU."""
        for key, (token_ids, logp) in zip(keys, responses, strict=True):
            if token_ids.shape != logp.shape or token_ids.dim() != 1:
                raise ValueError(f"prompt {key}: {tuple(token_ids.shape)} token ids, {tuple(logp.shape)} log-probs")
            # Copies: a row sliced from a batch would keep the whole batch's storage alive.
            self._responses[key] = PreviousResponse(
                token_ids.to("cpu", torch.int32, copy=True), logp.detach().to("cpu", torch.float32, copy=True)
            )

    def previous(self, key: str) -> PreviousResponse | None:
        """Return the response that `remember` kept, or None before the prompt's first visit."""
        return self._responses.get(key)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, exactly, as strings and flat tensors: torch.load(..., weights_only=True) reads it."""
        responses = list(self._responses.values())
        return {
            "preset": self.config.preset,
            "n0": self.n0,
            "keys": list(self._beta),
            "beta": torch.tensor(list(self._beta.values()), dtype=torch.float64).view(-1, 2),
            "recent_kl": torch.tensor(list(self._recent_kl), dtype=torch.float64),
            "response_keys": list(self._responses),
            "response_lengths": torch.tensor([len(response.token_ids) for response in responses], dtype=torch.int64),
            "response_token_ids": _concatenate([response.token_ids for response in responses], torch.int32),
            "response_logp": _concatenate([response.logp for response in responses], torch.float32),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the whole state by a `state_dict`.

        Raises:
            UserError: the state was made with another preset or N0.
        """
        if (state["preset"], state["n0"]) != (self.config.preset, self.n0):
            raise UserError(
                f"the checkpoint's value tracker has preset {state['preset']} and N0 {state['n0']:g}, this run has "
                f"{self.config.preset} and {self.n0:g}; resume with the checkpoint's algorithm.tracker.preset and "
                "rho_min, or start a new run"
            )
        self._beta = {key: (a, b) for key, (a, b) in zip(state["keys"], state["beta"].tolist(), strict=True)}
        self._recent_kl = deque(state["recent_kl"].tolist(), maxlen=KL_WINDOW)
        lengths = state["response_lengths"].tolist()
        token_ids = state["response_token_ids"].split(lengths)
        logp = state["response_logp"].split(lengths)
        self._responses = {}
        self.remember(state["response_keys"], [PreviousResponse(*pair) for pair in zip(token_ids, logp)])

    def _state(self, key: str) -> tuple[float, float]:
        return self._beta.get(key, (self.n0 / 2, self.n0 / 2))

    def _start(self, successes: float, trials: int) -> tuple[float, float]:
        if self.config.preset == "reference":
            mean = successes / trials
            return self.n0 * mean, self.n0 * (1 - mean)
        return smoothed_start(successes, trials, self.n0)


def _checked_rewards(keys: Sequence[str], rewards: Tensor) -> list[float]:
    if rewards.shape != (len(keys),):
        raise ValueError(f"{len(keys)} keys, rewards of shape {tuple(rewards.shape)}")
    values = rewards.tolist()
    for key, value in zip(keys, values):
        if not 0 <= value <= 1:  # also true of NaN
            raise UserError(f"prompt {key}: reward {value} is not in [0, 1]; rescale what the reward function returns")
    return values


def _concatenate(rows: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(rows) if rows else torch.empty(0, dtype=dtype)
