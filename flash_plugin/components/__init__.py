"""Components that torchtune instantiates: builders, modules, checkpointer, tokenizers, datasets."""
