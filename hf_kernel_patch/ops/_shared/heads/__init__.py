"""Not an op: what rope and qk_norm_rope share."""
