"""One job a file: plan, pretrain, train, predict."""
