"""The method of SPPO (arXiv 2405.00675) as pure functions of tensors: no files, parameters or devices."""

import torch
from torch import Tensor


def pairwise_scores(logits: Tensor) -> Tensor:
    """Position-debiased pairwise scores s(y_i, y_j; x) = (L_ij - L_ji) / 2.

    logits: (..., K, K), L_ij PairRM's logit with response i on the left and j on the right; the diagonal is ignored.
    Returns (..., K, K), antisymmetric, so that sigmoid(s_ij) + sigmoid(s_ji) = 1.
    """
    return (logits - logits.transpose(-1, -2)) / 2


def aggregate_scores(scores: Tensor) -> Tensor:
    """Differences of aggregates a_i - a_j, a_i = (1/K) sum_k (L_ik - L_ki): the released code's in the place of s(y_i, y_j; x).

    A Bradley-Terry model, which section 5.1 says PairRM's scores are not used as. They order the responses as `scores` do,
    about twice as far apart. scores: (..., K, K) pairwise scores. Returns (..., K, K), antisymmetric.
    """
    aggregate = 2 * scores.mean(-1)
    return aggregate[..., :, None] - aggregate[..., None, :]


def win_probabilities(scores: Tensor) -> Tensor:
    """P^(y_i > pi_t | x) = (1/K) sum_k P(y_i > y_k | x), P = sigmoid(s), k = i counting 1/2 (section 5.3, appendix A).

    scores: (..., K, K) pairwise scores. Returns (..., K), each within [1/(2K), 1 - 1/(2K)].
    """
    return torch.sigmoid(scores).mean(-1)


def choose_pair(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Winner and loser: argmax and argmin over i of the mean score (1/K) sum_k s(y_i, y_k; x) (Alg. 1, section 5.1).

    scores: (..., K, K) pairwise scores. Returns two int64 tensors (...). They are equal where all mean scores are: a tie.
    """
    mean = scores.mean(-1)
    return mean.argmax(-1), mean.argmin(-1)


def sppo_loss(policy_logps: Tensor, reference_logps: Tensor, probabilities: Tensor, eta: float) -> Tensor:
    """Squared loss of eq. 4.7: mean of (log pi_theta(y|x)/pi_t(y|x) - eta (P^(y > pi_t|x) - 1/2))^2.

    policy_logps, reference_logps: (N,) summed log-probabilities of the responses, in nats; probabilities: (N,) P^.
    N counts winners and losers alike. Returns a scalar; at the start of an iteration eta^2 mean((P^ - 1/2)^2).
    """
    return (policy_logps - reference_logps - eta * (probabilities - 0.5)).square().mean()


def dpo_loss(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """DPO's loss (arXiv 2305.18290, eq. 7): mean of -log sigmoid(beta (r_w - r_l)), r = log pi_theta(y|x)/pi_t(y|x).

    policy_logps, reference_logps: (2N,) summed log-probabilities, in nats, of N winners and then of their losers.
    """
    chosen, rejected = (policy_logps - reference_logps).chunk(2)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()


def ipo_loss(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """IPO's loss (arXiv 2310.12036, eq. 17): mean of (r_w - r_l - 1/(2 beta))^2, r summed over tokens. Else as dpo_loss."""
    chosen, rejected = (policy_logps - reference_logps).chunk(2)
    return (chosen - rejected - 1 / (2 * beta)).square().mean()


def loss(
    name: str, policy_logps: Tensor, reference_logps: Tensor, probabilities: Tensor, eta: float, beta: float | None
) -> Tensor:
    """The loss called `name` of N winners and, after them, their losers; each argument (2N,). Returns a scalar.

    sppo: eq. 4.7 with P^; sppo_hard: with 1 for each winner and 0 for each loser in its place; dpo and ipo: with beta.
    """
    if name == "sppo":
        return sppo_loss(policy_logps, reference_logps, probabilities, eta)
    if name == "sppo_hard":
        wins = torch.ones_like(probabilities).chunk(2)[0]
        return sppo_loss(policy_logps, reference_logps, torch.cat([wins, 1 - wins]), eta)
    assert beta is not None  # params.py sees to it
    return {"dpo": dpo_loss, "ipo": ipo_loss}[name](policy_logps, reference_logps, beta)


TOKENS_AT_ONCE = 1024
"""Of how many tokens logits exist at a time: a gigabyte or two at a vocabulary of 128,000."""


def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Log-probability of each token, without the logits of all of them: some are made at a time, and again for the gradient.

    hidden: (T, H), the model's last hidden states at the positions that predict the tokens; weight: (V, H) and bias: (V,) of
    its output layer, of hidden's dtype; targets: (T,) int64. softcap: Gemma 2's, logits = softcap tanh(logits / softcap).
    The log-softmax is taken in float32. Returns (T,) float32, in nats.
    """

    def some(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight, bias)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.float()
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    parts = zip(torch.split(hidden, TOKENS_AT_ONCE), torch.split(targets, TOKENS_AT_ONCE), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([some(*part) for part in parts])
    return torch.cat([torch.utils.checkpoint.checkpoint(some, *part, use_reentrant=False) for part in parts])
