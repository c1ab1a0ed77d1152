"""The equations of SPPO (arXiv 2405.00675) and of its baselines, as pure functions of tensors."""

import torch
from torch import Tensor


def pairwise_scores(logits: Tensor, scale: float) -> Tensor:
    """Compute position-debiased pairwise scores s(y_i, y_j; x) = scale (L_ij - L_ji).

    logits: (..., K, K), where L_ij is PairRM's logit with response i on the left and j on the right; the diagonal is ignored.
    scale: `rank.scale`, which the paper does not state: 0.5 is the mean of the logits of both orders, 1 is llm-blender's own
    `compare`. Returns (..., K, K), antisymmetric, so that sigmoid(s_ij) + sigmoid(s_ji) = 1.
    """
    return scale * (logits - logits.transpose(-1, -2))


def aggregate_scores(logits: Tensor) -> Tensor:
    """Compute differences of aggregate scores a_i - a_j, a_i = (1/K) sum_k (L_ik - L_ki), as the released code does.

    The released code uses these where the paper uses s(y_i, y_j; x). They form a Bradley-Terry model; section 5.1 says that
    PairRM's scores are not used as one. They order the responses as the pairwise scores do, and have no scale to choose.
    logits: (..., K, K), as in `pairwise_scores`. Returns (..., K, K), antisymmetric.
    """
    aggregate = pairwise_scores(logits, 1).mean(-1)
    return aggregate[..., :, None] - aggregate[..., None, :]


def win_probabilities(scores: Tensor) -> Tensor:
    """Compute P^(y_i > pi_t | x) = (1/K) sum_k P(y_i > y_k | x), P = sigmoid(s); k = i adds 1/2 (section 5.3, appendix A).

    scores: (..., K, K) pairwise scores. Returns (..., K), each within [1/(2K), 1 - 1/(2K)].
    """
    return torch.sigmoid(scores).mean(-1)


def choose_pair(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the pair to train on: argmax and argmin over i of the mean score (1/K) sum_k s(y_i, y_k; x) (Alg. 1, section 5.1).

    scores: (..., K, K) pairwise scores. Returns (chosen, rejected), two int64 tensors (...) of indices into the K responses.
    The two are equal if all mean scores are equal: a tie.
    """
    mean = scores.mean(-1)
    return mean.argmax(-1), mean.argmin(-1)


def sppo_loss(policy_logps: Tensor, reference_logps: Tensor, probabilities: Tensor, eta: float) -> Tensor:
    """Compute the squared loss of eq. 4.7: mean of (log pi_theta(y|x)/pi_t(y|x) - eta (P^(y > pi_t|x) - 1/2))^2.

    policy_logps, reference_logps: (N,) summed log-probabilities of the responses, in nats; probabilities: (N,) P^.
    N counts chosen and rejected responses alike. Returns a scalar, eta^2 mean((P^ - 1/2)^2) at the start of an iteration.
    """
    return (policy_logps - reference_logps - eta * (probabilities - 0.5)).square().mean()


def dpo_loss(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """Compute DPO's loss (arXiv 2305.18290, eq. 7): mean of -log sigmoid(beta (r_w - r_l)), r = log pi_theta(y|x)/pi_t(y|x).

    policy_logps, reference_logps: (2N,) summed log-probabilities, in nats: N chosen responses, then the N rejected ones.
    Returns a scalar.
    """
    chosen, rejected = (policy_logps - reference_logps).chunk(2)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()


def ipo_loss(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """Compute IPO's loss (arXiv 2310.12036, eq. 17): mean of (r_w - r_l - 1/(2 beta))^2, with r as in `dpo_loss`.

    policy_logps, reference_logps: (2N,), as for `dpo_loss`. Returns a scalar.
    """
    chosen, rejected = (policy_logps - reference_logps).chunk(2)
    return (chosen - rejected - 1 / (2 * beta)).square().mean()


def loss(
    name: str, policy_logps: Tensor, reference_logps: Tensor, probabilities: Tensor, eta: float, beta: float | None
) -> Tensor:
    """Compute the loss called `name` of N chosen responses followed by the N rejected ones.

    name: sppo (eq. 4.7 with P^), sppo_hard (eq. 4.7 with 1 for chosen and 0 for rejected responses instead of P^), dpo or ipo.
    policy_logps, reference_logps, probabilities: (2N,). eta: for sppo and sppo_hard; beta: for dpo and ipo, else None.
    Returns a scalar.
    """
    if name == "sppo":
        return sppo_loss(policy_logps, reference_logps, probabilities, eta)
    if name == "sppo_hard":
        wins = torch.ones_like(probabilities).chunk(2)[0]
        return sppo_loss(policy_logps, reference_logps, torch.cat([wins, 1 - wins]), eta)
    assert beta is not None  # guaranteed by the validation of params.yaml
    return {"dpo": dpo_loss, "ipo": ipo_loss}[name](policy_logps, reference_logps, beta)
