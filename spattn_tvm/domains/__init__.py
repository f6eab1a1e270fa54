"""Band arithmetic in TensorIR: from a head's bands to the loop bounds of its tiles."""
