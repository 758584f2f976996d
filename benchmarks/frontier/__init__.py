"""What training forgets at equal task loss: ways to train, as frontiers of KL and loss."""
