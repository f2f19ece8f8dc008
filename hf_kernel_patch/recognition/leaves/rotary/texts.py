"""The sources of rotary functions whose pairs are halves, and of the helpers that they call."""

from __future__ import annotations

ROTATE_HALF = """
def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
"""
#: Of cos and sin with one value for each pair.
OF_HALVES = """
def _apply_rotary_emb(x, cos, sin):
    first_half, second_half = torch.chunk(x, 2, dim=-1)
    first_ = first_half * cos - second_half * sin
    second_ = second_half * cos + first_half * sin
    return torch.cat((first_, second_), dim=-1)
"""
# -- the functions: what they take, what they do with cos and sin, and what with q and k

#: As transformers 4 and 5 have it.
V4 = "def apply_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):"
V5 = "def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):"
ONLY_FOUR = "def apply_rotary_pos_emb_vision(q, k, cos, sin):"
TOKENS_OF_K = (
    "def apply_rotary_pos_emb_2d(q, k, cos, sin, num_k_exclude_rope=0, repeat_freqs_k=False):"
)
SECTIONS = "def apply_multimodal_rotary_pos_emb(q, k, cos, sin, mrope_section, unsqueeze_dim=1):"
PREFIX = "def apply_rotary_pos_emb(q, k, cos, sin, **kwargs):"
OPTIONAL = "def apply_rotary_pos_emb(q, k=None, cos=None, sin=None, unsqueeze_dim=1):"
ONE_V4 = "def apply_rotary_pos_emb(x, cos, sin, position_ids=None, unsqueeze_dim=1):"
ONE_V5 = "def apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim=1):"
SIN_FIRST = "def apply_rotary_pos_emb(tensor, sin, cos):"

UNSQUEEZE = """
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
"""
MERGED = """
    mrope_section = mrope_section * 2
    cos = torch.cat([m[i % 3] for i, m in enumerate(cos.split(mrope_section, dim=-1))], dim=-1)\\
        .unsqueeze(unsqueeze_dim)
    sin = torch.cat([m[i % 3] for i, m in enumerate(sin.split(mrope_section, dim=-1))], dim=-1)\\
        .unsqueeze(unsqueeze_dim)
"""
WHOLE = """
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed
"""
_PART = """
    rotary_dim = cos.shape[-1]
    q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
    k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
"""
PART_IN_TWO_STEPS = f"""{_PART}
    q_embed = (q_rot * cos) + (rotate_half(q_rot) * sin)
    k_embed = (k_rot * cos) + (rotate_half(k_rot) * sin)
    q_embed = torch.cat([q_embed, q_pass], dim=-1)
    k_embed = torch.cat([k_embed, k_pass], dim=-1)
    return q_embed, k_embed
"""
FULL = UNSQUEEZE + WHOLE
PARTIAL = f"""{UNSQUEEZE}{_PART}
    q_embed = torch.cat([(q_rot * cos) + (rotate_half(q_rot) * sin), q_pass], dim=-1)
    k_embed = torch.cat([(k_rot * cos) + (rotate_half(k_rot) * sin), k_pass], dim=-1)
    return q_embed, k_embed
"""
PARTIAL_IN_TWO_STEPS = UNSQUEEZE + PART_IN_TWO_STEPS
PARTIAL_OVER_Q = f"""{UNSQUEEZE}
    rot_dim = cos.shape[-1]
    q, q_pass = q[..., :rot_dim], q[..., rot_dim:]
    k, k_pass = k[..., :rot_dim], k[..., rot_dim:]
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return torch.cat((q_embed, q_pass), dim=-1), torch.cat((k_embed, k_pass), dim=-1)
"""
PARTIAL_OF_ONE_OR_TWO = f"""{UNSQUEEZE}
    rotary_dim = cos.shape[-1]
    q_rope, q_nope = q[..., :rotary_dim], q[..., rotary_dim:]
    q_rope = (q_rope * cos) + (rotate_half(q_rope) * sin)
    q_rotated = torch.cat([q_rope, q_nope], dim=-1)
    if k is not None:
        k_rope, k_nope = k[..., :rotary_dim], k[..., rotary_dim:]
        k_rope = (k_rope * cos) + (rotate_half(k_rope) * sin)
        k_rotated = torch.cat([k_rope, k_nope], dim=-1)
        return q_rotated, k_rotated
    else:
        return q_rotated
"""
# OLMo2 casts back to q's and k's dtype, which matters where cos and sin are float32.
CAST = f"""
    q_type, k_type = q.dtype, k.dtype
    {UNSQUEEZE}
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed.to(q_type), k_embed.to(k_type)
"""
FLOAT = f"""
    original_dtype = q.dtype
    {UNSQUEEZE}
    q_embed = (q.float() * cos) + (rotate_half(q.float()) * sin)
    k_embed = (k.float() * cos) + (rotate_half(k.float()) * sin)
    return q_embed.to(original_dtype), k_embed.to(original_dtype)
"""
FLOAT_ANGLES = """
    origin_dtype = q.dtype
    q, k = q.float(), k.float()
    cos = cos.unsqueeze(unsqueeze_dim).float()
    sin = sin.unsqueeze(unsqueeze_dim).float()
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed.to(origin_dtype), k_embed.to(origin_dtype)
"""
VISION = """
    orig_q_dtype = q.dtype
    orig_k_dtype = k.dtype
    q, k = q.float(), k.float()
    cos, sin = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    q_embed = q_embed.to(orig_q_dtype)
    k_embed = k_embed.to(orig_k_dtype)
    return q_embed, k_embed
"""
VISION_PARTIAL = """
    rot_dim = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    q_rot, q_pass = q[..., :rot_dim], q[..., rot_dim:]
    k_rot, k_pass = k[..., :rot_dim], k[..., rot_dim:]
    q_rot = (q_rot * cos) + (rotate_half(q_rot) * sin)
    k_rot = (k_rot * cos) + (rotate_half(k_rot) * sin)
    return torch.cat([q_rot, q_pass], dim=-1), torch.cat([k_rot, k_pass], dim=-1)
"""
OF_EACH = f"""{UNSQUEEZE}
    q_embed = _apply_rotary_emb(q, cos, sin)
    k_embed = _apply_rotary_emb(k, cos, sin)
    return q_embed, k_embed
"""
ONE = f"""{UNSQUEEZE}
    return (x * cos) + (rotate_half(x) * sin)
"""
ONE_BY_NAME = f"""{UNSQUEEZE}
    x_embed = (x * cos) + (rotate_half(x) * sin)
    return x_embed
"""
MERGED_WHOLE = MERGED + WHOLE
MERGED_PARTIAL = MERGED + PART_IN_TWO_STEPS
AFTER_PREFIX = """
    num_tokens = q.shape[-2]
    num_patches = sin.shape[-2]
    num_prefix_tokens = num_tokens - num_patches
    q_prefix_tokens, q_patches = q.split((num_prefix_tokens, num_patches), dim=-2)
    k_prefix_tokens, k_patches = k.split((num_prefix_tokens, num_patches), dim=-2)
    q_patches = (q_patches * cos) + (rotate_half(q_patches) * sin)
    k_patches = (k_patches * cos) + (rotate_half(k_patches) * sin)
    q = torch.cat((q_prefix_tokens, q_patches), dim=-2)
    k = torch.cat((k_prefix_tokens, k_patches), dim=-2)
    return q, k
"""
