"""Components that torchtune instantiates: builders, modules, checkpointer, tokenizers, datasets."""

from flash_plugin.components.host import work_around

work_around()
