"""Published algorithms, each a choice of advantage A, loss of a token c, and mean over tokens; here is what GSPO alone needs.

    loss = 1/denominator sum over tokens of weight_t c(ratio_t, A)         ratio_t = exp(lp_t - old_t)

    A: advantage.py    c: policy_head (ppo, cispo), below (gspo)    weight, denominator: packing.py    settings: config.ALGORITHMS

    REINFORCE++  A over turns, whitened over the batch; c = ppo; mean over tokens
                 Hu, https://arxiv.org/abs/2501.03262, with the turns, clips and dual clip of L0, https://arxiv.org/abs/2506.23667
    GRPO         A against the group; c = ppo; mean over the tokens of a trajectory, then over trajectories
                 Shao et al., "DeepSeekMath", https://arxiv.org/abs/2402.03300, section 4.1
    Dr. GRPO     A centred, not divided by the spread; c = ppo; divided by a constant, so that the same error weighs no less
                 in a long answer; Liu et al., "Understanding R1-Zero-Like Training", https://arxiv.org/abs/2503.20783, section 3.2
    RLOO         A against the others; REINFORCE on whole trajectories, so the sum over tokens divided by a constant
                 Ahmadian et al., "Back to Basics", https://arxiv.org/abs/2402.14740
    DAPO         GRPO's A; a wider clip above (clip-higher), for rare tokens to grow; mean over all tokens; no KL
                 Yu et al., https://arxiv.org/abs/2503.14476, sections 3.1 and 3.3; its dynamic sampling is rollout.drop_rate = 1
    GSPO         GRPO's A; one ratio a sequence, s = exp(mean over its tokens of lp - old), for every token's c
                 Zheng et al., "Group Sequence Policy Optimization", https://arxiv.org/abs/2507.18071, section 4
    CISPO        GRPO's A; c = -A stop(clip(ratio)) lp, so that a clipped token still learns; no clip below; mean over all
                 tokens; no KL; MiniMax, "MiniMax-M1", https://arxiv.org/abs/2506.13585, section 3.1

Numbers that a paper does not print are PPO's 0.2 for the clip of GRPO, and DAPO's 0.28 above for CISPO. While a batch gets
one optimizer step every ratio is 1, no clip takes hold, and what tells the algorithms apart is A and the mean.

GSPO's gradient needs s before any token's loss: a pass without gradient gives lp, `gspo_coefficients` turns A into
A s, or 0 where the clip took hold, and policy_head with no old log-probs (ratio 1) makes A s dlp/dtheta of it. A sequence
is a row of a pack: an episode whose context was trimmed has several, each with its own ratio.
"""

import numpy as np

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here before exp [nats]."""


def sequence_ratios(
    logprobs: np.ndarray, old_logprobs: np.ndarray, loss_weights: np.ndarray, sequences: np.ndarray
) -> np.ndarray:
    """[R] float64: at each token its sequence's s = exp(mean of lp - old), over the tokens with a weight > 0.

    Args:
        logprobs, old_logprobs, loss_weights: [R] [nats].
        sequences: [R] int: which sequence a token belongs to. All of a sequence must be there.
    """
    counts = loss_weights > 0
    d = np.where(counts, logprobs.astype(np.float64) - old_logprobs, 0.0)
    total, tokens = np.bincount(sequences, d), np.bincount(sequences, counts)
    mean = total / np.maximum(tokens, 1)
    return np.exp(np.clip(mean, -MAX_LOG_RATIO, MAX_LOG_RATIO))[sequences]


def gspo_coefficients(
    logprobs: np.ndarray,
    old_logprobs: np.ndarray,
    advantages: np.ndarray,
    loss_weights: np.ndarray,
    sequences: np.ndarray,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[np.ndarray, np.ndarray]:
    """What takes the place of the advantages in policy_head, without old log-probs, for it to make GSPO's gradient.

    The gradient is GSPO's for weights of 1/tokens (loss_mean = "sequence"), and for others that of the same clipped ratio
    with those weights. The loss that policy_head reports counts a clipped token as 0.

    Args:
        logprobs, old_logprobs, advantages, loss_weights, sequences: [R], as in `sequence_ratios`. Advantages may differ
            from token to token (GSPO-token, section 4.3 of the paper).

    Returns:
        coefficients [R] float32, and where the clip took hold [R] bool.
    """
    ratios = sequence_ratios(logprobs, old_logprobs, loss_weights, sequences)
    too_high = (advantages > 0) & (ratios > 1 + clip_high)
    too_low = (advantages < 0) & (ratios < 1 - clip_low)
    clipped = too_high | too_low
    return np.where(clipped, 0.0, advantages * ratios).astype(np.float32), clipped
