"""The fuzzer of the decoders, and the corpus that it has grown."""
