"""Not an op: what rms_norm and add_rms_norm share."""
