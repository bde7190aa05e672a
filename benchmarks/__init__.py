"""What fastflow's steps, samplers and loaders cost."""
