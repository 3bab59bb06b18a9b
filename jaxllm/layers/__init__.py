"""The parts that models are composed of: small nnx modules over flat ragged batches of tokens."""
