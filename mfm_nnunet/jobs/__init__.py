"""The jobs, one per file: plan, pretrain, train, predict."""
