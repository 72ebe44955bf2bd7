"""What a low-bit weight is (types, formats), how its codes are chosen (quantizers), and the main job (pipeline)."""
