"""Raw networks F(x, c_noise, cond, augment): one file per architecture. See networks/README.md."""
