"""What every native attack stands on: the contract, the loop, cheap search, the model under attack, random numbers."""
