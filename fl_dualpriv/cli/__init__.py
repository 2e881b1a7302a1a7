"""The commands of ``fl-dualpriv``. The package imports quickly: no Flower, Ray or torch."""
