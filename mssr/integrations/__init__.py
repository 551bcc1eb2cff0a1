"""Our loss in other trainers, one module per framework. Import only those whose framework is installed."""
