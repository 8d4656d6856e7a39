"""The lab: small real trainings on a CPU, and experiments made of them."""
