"""INTO nnU-Net: the one trainer and its plug-in folder."""
