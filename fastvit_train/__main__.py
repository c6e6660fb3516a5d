from fastvit_train.cli.main import main

main()
