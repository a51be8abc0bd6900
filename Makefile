# What one types to build, try and check hallpass; `make` lists it.

CARGO = cargo
BUF = tools/node_modules/.bin/buf
IMAGE = proto/hallpass.v1.binpb
SCRIPTS = .ci/run tools/*.sh fuzz/*.sh deploy/compose/*.sh

# cargo's tools that are not Rust's own, built from their authors' lock files.
TOOLS = $(or $(CARGO_TARGET_DIR),target)/tools
DENY = $(TOOLS)/cargo-deny-0.20.2/bin/cargo-deny
CYCLONEDX = $(TOOLS)/cargo-cyclonedx-0.5.9/bin/cargo-cyclonedx
DEPLOY_PYTHON = $(or $(CARGO_TARGET_DIR),target)/python-deploy
SCHEMATHESIS = $(or $(CARGO_TARGET_DIR),target)/python-schemathesis/bin/schemathesis

# A rustup that was installed a minute ago is not on PATH yet.
export PATH := $(PATH):$(HOME)/.cargo/bin

# rustup looks for its toolchains under HOME. Where HOME has none, take those beside the cargo that PATH names.
ifeq ($(RUSTUP_HOME)$(wildcard $(HOME)/.rustup/toolchains),)
cargo_on_path := $(firstword $(wildcard $(addsuffix /cargo,$(subst :, ,$(PATH)))))
ifneq ($(wildcard $(dir $(cargo_on_path))../../.rustup/toolchains),)
export RUSTUP_HOME := $(abspath $(dir $(cargo_on_path))../../.rustup)
endif
endif

# npm trusts what the machine trusts, a company's own authority too.
ifeq ($(NODE_EXTRA_CA_CERTS),)
export NODE_EXTRA_CA_CERTS := $(wildcard /etc/ssl/certs/ca-certificates.crt)
endif

# What the examples import, as their lock files have it. Installed once: tests then need no network.
NODE_MODULES = examples/express/node_modules/.package-lock.json examples/node/node_modules/.package-lock.json
PYTHON = target/python/bin/python

.PHONY: help alerts demo examples test lint lint-alerts lint-dependencies lint-deploy lint-fuzz lint-http lint-mutants lint-rust lint-proto lint-scripts advisories attacks \
	audit-figures bench audit-kills audit-plans audit-stress freeze fuzz instructions mutants figures overload sbom torture torture-mutants revocation web-figures

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

demo: ## serve a made-up district from a private PostgreSQL, with commands to paste
	@tools/prerequisites.sh rust cc postgresql psql
	@echo 'building hallpass; the first time takes some minutes'
	@$(CARGO) build --release --locked --quiet --bin hallpass
	@$(CARGO) run --release --locked --quiet --bin hallpass -- demo

test: examples ## run all tests, on a PostgreSQL of their own
	@tools/prerequisites.sh rust cc postgresql
	$(CARGO) test --workspace --exclude hallpass-fuzz --locked

examples: $(NODE_MODULES) target/python/installed ## install what the examples import, for tests to run them

examples/%/node_modules/.package-lock.json: examples/%/package.json examples/%/package-lock.json
	@tools/prerequisites.sh npm
	npm ci --prefix examples/$* --ignore-scripts --no-audit --no-fund --no-update-notifier --loglevel=error
	@touch $@

# With the stubs that the examples in Python import.
target/python/installed: examples/python/requirements.txt $(wildcard proto/*/*/*.proto)
	@tools/prerequisites.sh python
	python3 -m venv target/python
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --requirement $<
	$(PYTHON) -m grpc_tools.protoc -I proto --python_out=target/python --grpc_python_out=target/python \
		hallpass/v1/audit_service.proto hallpass/v1/permission_service.proto
	@touch $@

lint: lint-mutants lint-alerts lint-deploy lint-rust lint-dependencies lint-fuzz lint-proto lint-http lint-scripts ## check formatting, lints, documentation, dependencies, the parsers, the contracts, alerts, manifests and the scripts

lint-rust:
	@tools/prerequisites.sh rust rust-lints cc c++
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --document-private-items --locked

# Against the frozen image: nothing that callers rely on has changed, and what is new is frozen with it.
lint-proto: $(BUF)
	$(BUF) lint
	$(BUF) breaking --against $(IMAGE)
	@$(BUF) build --exclude-source-info -o - | cmp -s - $(IMAGE) \
		|| { echo '$(IMAGE) is not of these protos: run `make freeze` and commit it' >&2; exit 1; }

# Made-up input for every operation that is served over HTTP: nothing fails, and every answer is described.
lint-http: $(SCHEMATHESIS)
	@tools/prerequisites.sh rust cc postgresql
	@$(CARGO) build --locked --quiet --bin hallpass
	@tools/schemathesis.sh $(SCHEMATHESIS)

$(SCHEMATHESIS): tools/schemathesis.txt
	@tools/prerequisites.sh python
	python3 -m venv $(@:/bin/schemathesis=)
	$(@:/bin/schemathesis=)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

# The alerts are raised and end when they should: the rules alone, without a Prometheus that runs. Debian's promtool knows
# nothing of Kubernetes.
lint-alerts:
	@tools/prerequisites.sh promtool
	promtool check config deploy/prometheus/prometheus.yml
	sed '/kubernetes_sd_configs:/,/label:/d' deploy/prometheus/kubernetes.yml | promtool check config --syntax-only /dev/stdin
	cd deploy/prometheus && promtool test rules hallpass.rules.test.yml hallpass.budget.test.yml

# The unit, the image and the manifests, as far as they can be judged without systemd, Docker and a cluster.
lint-deploy: $(DEPLOY_PYTHON)/installed
	@tools/prerequisites.sh systemd-analyze kubectl
	@tools/deploy.sh $(DEPLOY_PYTHON)/bin

$(DEPLOY_PYTHON)/installed: tools/deploy.txt
	@tools/prerequisites.sh python
	python3 -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

lint-scripts:
	@tools/prerequisites.sh shellcheck
	shellcheck $(SCRIPTS)

# Whoever changes the code around a safety check changes the patch that takes it out.
lint-mutants:
	@for patch in tests/mutants/*.patch; do git apply --check $$patch || exit 1; done

lint-dependencies: $(DENY)
	$(DENY) --workspace --locked check bans licenses sources

# Long enough for each target to meet what it starts from, and to notice a check that is gone.
lint-fuzz:
	@tools/prerequisites.sh rust cc c++
	@tools/fuzz.sh 10

fuzz: ## make input up for every parser, guided by its branches: SECONDS_EACH=600
	@tools/prerequisites.sh rust cc c++
	@tools/fuzz.sh $(or $(SECONDS_EACH),600)

advisories: $(DENY) ## ask RustSec for known vulnerabilities of what we depend on
	$(DENY) --workspace --locked check advisories

sbom: $(CYCLONEDX) ## write what the program is made of to target/hallpass.cdx.json (CycloneDX)
	$(CYCLONEDX) cyclonedx --quiet --format json --spec-version 1.5 --override-filename hallpass.cdx
	@sed 's#path+file://$(CURDIR)#path+file://#g' hallpass.cdx.json >target/hallpass.cdx.json
	@rm -f hallpass.cdx.json client/hallpass.cdx.json fuzz/hallpass.cdx.json

# The directory says NAME-VERSION. Not optimized: they run for a second, and are built in half the time.
$(DENY) $(CYCLONEDX):
	@tools/prerequisites.sh rust cc
	CARGO_PROFILE_DEV_DEBUG=false $(CARGO) install --quiet --locked --debug --root $(@:/bin/$(@F)=) \
		$(patsubst $(TOOLS)/$(@F)-%/bin/$(@F),$(@F)@%,$@)

freeze: $(BUF) ## freeze what was added to the contract, so that it can never change
	$(BUF) breaking --against $(IMAGE)
	$(BUF) build --exclude-source-info -o $(IMAGE)

$(BUF): tools/package.json tools/package-lock.json
	@tools/prerequisites.sh npm
	npm ci --prefix tools --ignore-scripts --no-audit --no-fund --no-update-notifier --loglevel=error
	@touch $@

mutants: examples ## take out one safety check after the other and see the tests fail
	@tools/prerequisites.sh rust cc postgresql
	@tools/mutants.sh $(ONLY)

bench: ## measure a check beside an empty RPC, under load, and as users, members and changes grow; writes target/bench/
	@tools/prerequisites.sh rust cc postgresql
	@$(CARGO) build --release --locked --quiet
	@mkdir -p target/bench
	@target/release/hallpass bench --baseline --data-dir target/bench/data --json target/bench/load.json --svg target/bench/load.svg
	@$(CARGO) bench --locked --quiet --bench growth -- --json target/bench/growth.json

instructions: ## count the instructions of a cached check, and fail when they have grown
	@tools/prerequisites.sh rust cc valgrind
	@tools/instructions.sh

figures: ## measure, and print the figures
	@tools/prerequisites.sh rust cc postgresql
	@$(CARGO) bench --locked --bench figures
	@$(CARGO) bench --locked --bench adoption
	@$(CARGO) bench --locked --bench credentials

attacks: ## attack the service over loopback, and print what a well-behaved caller gets; ONLY=part of an attack's name
	@tools/prerequisites.sh rust cc postgresql
	@$(CARGO) bench --locked --bench attacks -- $(ONLY)

overload: ## offer three times what the service can answer, and print what becomes of it
	@tools/prerequisites.sh rust cc postgresql
	@$(CARGO) bench --locked --bench attacks -- --overload

# The tests' own binary, as it is released: most of a run is questions, and the machine's two cores answer them too.
audit-plans: ## see that lists of the audit log read their indexes at a million rows
	@tools/prerequisites.sh rust cc postgresql
	@$(CARGO) test --locked --quiet --test it -- --exact audit_list::lists_read_their_indexes_of_a_million_rows --ignored

alerts: ## raise every alert on a real Prometheus with two replicas, and see each panel of the dashboard filled
	@tools/prerequisites.sh rust cc postgresql promtool
	@$(CARGO) test --locked --quiet --test it -- alerts_fire:: --ignored --nocapture

audit-kills: ## kill a replica and the database TIMES=25 times each, and compare what audit streams got with the log
	@tools/prerequisites.sh rust cc postgresql psql
	@TIMES=$(TIMES) SEED=$(SEED) $(CARGO) test --release --locked --quiet --test it -- \
		--exact torture::audit_streams_lose_nothing_through_kills --ignored --nocapture

audit-figures: ## measure how late audit entries arrive, and how fast a million of them are exported
	@tools/prerequisites.sh rust cc postgresql
	@$(CARGO) test --release --locked --quiet --test it -- audit_figures:: --ignored --nocapture --test-threads 1

audit-stress: ## cut and resume 100 audit streams while 32 writers write for ten seconds, and compare with the tables
	@tools/prerequisites.sh rust cc postgresql
	@$(CARGO) test --release --locked --quiet --test it -- --exact audit_stress::streams_that_are_cut_for_long_lose_nothing --ignored --nocapture

torture: ## kill, stop, cut off and restore for a quarter of an hour, and check CHECKS=10000000 answers against history
	@tools/prerequisites.sh rust cc postgresql psql
	@CHECKS=$(CHECKS) TIMES=$(TIMES) SEED=$(SEED) $(CARGO) test --release --locked --quiet --test it -- \
		--exact torture::answers_are_right_through_every_fault --ignored --nocapture

torture-mutants: examples ## take out what keeps answers fresh, one after the other, and see the torture find it
	@tools/prerequisites.sh rust cc postgresql psql
	@tools/mutants.sh --torture $(ONLY)

revocation: ## measure how long a revocation takes to reach three replicas
	@tools/prerequisites.sh rust cc postgresql psql
	@$(CARGO) test --release --locked --quiet --test it -- \
		--exact torture::revocation::a_revocation_reaches_every_replica --ignored --nocapture

web-figures: ## measure pages of an organization of 10,000 members over HTTP, and a thousand requests a minute
	@tools/prerequisites.sh rust cc postgresql
	@$(CARGO) test --release --locked --quiet --test it -- web_figures:: --ignored --nocapture --test-threads 1
