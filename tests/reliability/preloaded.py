"""What the server that forks the victims imports."""

from fastvit_train.distributed.slow_imports import slow_imports

with slow_imports():
    import fastvit_train.cli.main
    import fastvit_train.training.loop  # noqa: F401
    import tests.reliability.victims  # noqa: F401
