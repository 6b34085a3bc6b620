"""The `fsdp:` section: parameters, gradients and optimiser states divided over the processes (torch's fully_shard)."""

from loradock_train.config_sections import Names, Section


class FsdpOptions(Section):
    """Divide the model over the processes of the run. Its presence is enough: `fsdp: {}`."""

    enabled: bool = True
    """Default true; false is as if the section were not there."""

    reshard_after_forward: bool = True
    """Give the parameters of a block back after its forward pass, and fetch them again for the backward pass: less
    memory, more traffic. Default true."""

    cpu_offload: bool = False
    """Keep parameters and optimiser states in the memory of the CPU; needs GPUs. Default false."""

    activation_checkpointing: bool = False
    """As gradient_checkpointing. Default false."""

    wrap: Names = ()
    """Class names of the modules whose parameters come and go together. Default: the blocks that the model names
    itself."""
