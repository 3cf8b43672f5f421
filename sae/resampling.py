"""What is done to dead latents between steps: they are restarted where the loss is large (Bricken et al. 2023, appendix
"Neuron resampling"), or raised until AuxK reaches them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.engine import Engine

# The length of a new encoder row, as a share of what live latents have. Where all positive pre-latents fire, a short
# row fires as well, and takes over nothing at once; where latents compete, a short row would never win.
SHARE_WHERE_ALL_FIRE, SHARE_IN_COMPETITION = 0.2, 1.0

# Steps in which the negative bias of a dead latent falls to 1 / e of itself. On the toy model, three seeds: JumpReLU at
# L0 1.94 FVU .064 -> .050 and MCC .974 -> .995; BatchTopK FVU .066 -> .053, MCC .966 -> .992. In 64 steps BatchTopK the
# same, but p-annealing's FVU on the Zipf set .542 -> .548.
RAISED_IN = 256


@torch.no_grad()
def raise_(engine: Engine, dead: Int[Tensor, " n_dead"], n_steps: int) -> None:
    """b_enc_j (1 - n_steps / RAISED_IN) where b_enc_j < 0, for dead latents.

    AuxK does nothing for a latent whose pre-latents are negative on all rows. A bias that rises makes some positive,
    and AuxK does the rest.
    """
    bias = engine.state.b_enc
    own = bias.index_select(0, dead)
    bias.index_copy_(0, dead, own.where(own >= 0, own * (1 - n_steps / RAISED_IN)))


@torch.no_grad()
def resample_(
    engine: Engine,
    activations: Float[Tensor, "batch d_in"],
    unit: float,
    dead: Int[Tensor, " n_dead"],
    stream: torch.Generator,
) -> int:
    """Gives dead latents activations of the batch to explain; returns the number of latents restarted.

        P(row b) ~ |x_b - x_hat_b|^4,   W_dec_j = x_b / |x_b|,   W_enc_j = c mean_alive |W_enc| W_dec_j,   b_enc_j = 0

    x is centred; c is the paper's .2 for a ReLU, and 1 where latents compete. No row is drawn twice, so no two
    latents become the same; latents for which no row is left stay dead until the next time. Adam's moments of these
    rows and their counters of silence restart at 0. The host waits.
    """
    sae, state = engine.sae, engine.state
    a = activations.to(state.W_dec.dtype) / unit
    x = a - sae.input_centre.detach()
    x_hat = sae.decode(sae.training_codes(a))
    if sae.W_skip is not None:
        x_hat = x_hat + x @ sae.W_skip
    losses = (a - x_hat).square().sum(dim=1).double().cpu()
    share = (losses / losses.max().clamp_min(1e-300)).square().nan_to_num_(0)
    share.masked_fill_((x == 0).all(dim=1).cpu(), 0)
    alive = torch.ones(sae.d_sae, dtype=torch.bool, device=x.device).index_fill_(0, dead, False)
    n = min(len(dead), int((share > 0).sum()))
    if not n:
        return 0
    dead, chosen = dead[:n], torch.multinomial(share, n, generator=stream).to(x.device)
    rows = x[chosen] / x[chosen].norm(dim=1, keepdim=True)
    state.W_dec.index_copy_(0, dead, rows)
    if state.encoder.data_ptr() != state.W_dec.data_ptr():
        length = state.encoder[alive].norm(dim=1).mean() if bool(alive.any()) else state.encoder.norm(dim=1).mean()
        share_of_length = SHARE_WHERE_ALL_FIRE if sae.sparsifier.passes_positive else SHARE_IN_COMPETITION
        state.encoder.index_copy_(0, dead, share_of_length * length * rows)
    state.b_enc.index_fill_(0, dead, 0)
    moments = [part[name] for part in (state.first, state.second) for name in state.first if name != "b_dec"]
    moments += [moment for weight, *own in engine.own.values() for moment in own if weight.shape[:1] == (sae.d_sae,)]
    for moment in (*moments, state.silent_samples):
        moment.index_fill_(0, dead, 0)
    sae.sparsifier.renew_(dead)
    engine.kernels.refresh(state)
    return n
