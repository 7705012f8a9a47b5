"""The parts of the build, one idea each; ``kernels.build`` puts them together."""
