"""The operators a layer computes with: one public function each, whatever the machine."""
