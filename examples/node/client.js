// Checks and lists permissions, and follows the audit log, over gRPC.

import fs from 'node:fs';
import { setTimeout } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const endpoint = new URL(process.env.HALLPASS_ENDPOINT ?? 'http://127.0.0.1:50051');
const DEADLINE_MS = 5000;
const OPTIONS = {
  'grpc.max_receive_message_length': 64 << 20, // an audit entry can be larger than the 4 MiB of the default
  'grpc.keepalive_time_ms': 30_000, // who waits for the next change must notice a connection that is gone
};

const protos = ['hallpass/v1/permission_service.proto', 'hallpass/v1/audit_service.proto'];
const includeDirs = [fileURLToPath(new URL('../../proto', import.meta.url))];
const shape = { keepCase: true, defaults: true, enums: String, oneofs: true };
const loaded = protoLoader.loadSync(protos, { includeDirs, ...shape });
const { PermissionService, AuditService } = grpc.loadPackageDefinition(loaded).hallpass.v1;
const credentials = endpoint.protocol === 'https:' ? grpc.credentials.createSsl() : grpc.credentials.createInsecure();
const metadata = new grpc.Metadata();
if (process.env.HALLPASS_TOKEN) metadata.set('authorization', `Bearer ${process.env.HALLPASS_TOKEN}`);

async function ask(method, request) {
  const client = new PermissionService(endpoint.host, credentials, OPTIONS);
  return promisify(client[method]).call(client, request, metadata, { deadline: Date.now() + DEADLINE_MS });
}

async function check(organization_id, user_id, permission) {
  const { allowed, reason } = await ask('CheckPermission', { organization_id, user_id, permission });
  console.log(allowed ? 'allow' : 'deny', reason);
  process.exitCode = allowed ? 0 : 1;
}

async function list(organization_id, user_id) {
  const { permissions } = await ask('ListUserPermissions', { organization_id, user_id });
  for (const { permission, allowed, reason } of permissions) {
    console.log(allowed ? 'allow' : 'deny', reason, permission);
  }
}

// Prints each change once. A crash between printing and keeping repeats a few: drop those whose `id` you have.
async function follow(cursorFile) {
  const client = new AuditService(endpoint.host, credentials, OPTIONS);
  for (;;) {
    const cursor = fs.existsSync(cursorFile) ? fs.readFileSync(cursorFile, 'utf8') : '';
    try {
      const start = cursor ? { cursor } : { earliest: true };
      for await (const { event, entries, checkpoint, gap } of client.StreamAuditEntries(start, metadata)) {
        for (const entry of entries?.entries ?? []) {
          console.log(entry.cursor, entry.change_type, entry.table, entry.organization_id, entry.after);
        }
        if (event === 'gap') console.error('removed before it was read:', gap.from, 'to', gap.to);
        keep(cursorFile, entries?.entries.at(-1).cursor ?? checkpoint?.cursor ?? gap.to);
      }
    } catch (error) {
      // A stream ends when the service does, and now and then. DATA_LOSS above all is another matter: somebody must
      // decide where to begin.
      if (![grpc.status.UNAVAILABLE, grpc.status.RESOURCE_EXHAUSTED].includes(error.code)) throw error;
      await setTimeout(1000);
    }
  }
}

// The whole cursor or the one before, whatever happens meanwhile.
function keep(file, cursor) {
  fs.writeFileSync(`${file}.new`, cursor);
  const written = fs.openSync(`${file}.new`);
  fs.fsyncSync(written);
  fs.closeSync(written);
  fs.renameSync(`${file}.new`, file);
}

const commands = { check, list, follow };
const [command, ...rest] = process.argv.slice(2);
if (!Object.hasOwn(commands, command ?? '') || rest.length !== commands[command].length) {
  console.error('usage: client.js check ORGANIZATION USER PERMISSION | list ORGANIZATION USER | follow CURSOR_FILE');
  process.exit(2);
}
commands[command](...rest).catch((error) => {
  console.error(error.message);
  process.exit(2);
});
