"""The torch operators. One file an operator: launcher, CPU implementation, gradient, public function."""
