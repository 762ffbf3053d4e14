"""What all entry points share: configuration, tracking, errors. Imports neither models nor training."""
