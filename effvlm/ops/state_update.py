import torch
from torch.nn.functional import silu, softplus
def state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    one = state.dim() == 3
    if one:
        state, x, dt, A, B, C = state[:, None], x[:, None], dt[:, None], A[None], B[:, None], C[:, None]
        D, z, dt_bias = (None if D is None else D[None]), (None if z is None else z[:, None]), (None if dt_bias is None else dt_bias[None])
    t = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    t = softplus(t) if dt_softplus else t
    H = state.shape[1]
    B, C = (b.float().repeat_interleave(H // b.shape[1], 1) for b in (B, C))
    new = state * (t[..., None] * A).exp() + (t * x.float())[..., None] * B[:, :, None]
    state.copy_(new)
    out = (new * C[:, :, None]).sum(-1)
    if D is not None: out = out + D * x
    if z is not None: out = out * silu(z.float())
    out = out.to(x.dtype)
    return out[:, 0] if one else out
def delta_update(state, q, k, v, g, beta, *, scale=None, l2norm=False):
    from effvlm.ops.chunk_scan import reference
    out, new = reference(q[:, None], k[:, None], v[:, None], g[:, None], None, beta[:, None], None, state, None, scale or q.shape[-1] ** -0.5, l2norm)
    state.copy_(new)
    return out[:, 0]
