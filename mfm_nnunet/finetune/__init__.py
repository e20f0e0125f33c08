"""nnU-Net integration: the one trainer and its plug-in folder."""
