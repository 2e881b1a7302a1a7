"""The folder of a run (results, checkpoints, locks and tables), and the resources of the machine."""
