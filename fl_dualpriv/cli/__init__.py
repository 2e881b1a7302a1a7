"""The commands of ``fl-dualpriv``. Light on import."""
