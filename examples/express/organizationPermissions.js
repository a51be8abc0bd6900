// In place of PTO Connect's middleware of this name: the same two functions with the same answers, decided by hallpass.
// Whatever is not a decision is answered with 503: an error is never an allow.

import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const endpoint = new URL(process.env.HALLPASS_ENDPOINT ?? 'http://127.0.0.1:50051');
const token = process.env.HALLPASS_TOKEN; // an API key with the scope `check`, where hallpass asks for one
// hallpass answers within milliseconds. A page that waits longer than this had better say that it cannot tell.
const DEADLINE_MS = Number(process.env.HALLPASS_DEADLINE_MS ?? 1000);

const { hallpass } = grpc.loadPackageDefinition(
  protoLoader.loadSync('hallpass/v1/permission_service.proto', {
    includeDirs: [fileURLToPath(new URL('../../proto', import.meta.url))],
    keepCase: true,
    defaults: true, // a field that is false is there
    enums: String,
    oneofs: true,
  }),
);
const client = new hallpass.v1.PermissionService(
  endpoint.host,
  endpoint.protocol === 'https:' ? grpc.credentials.createSsl() : grpc.credentials.createInsecure(),
  { 'grpc.keepalive_time_ms': 10_000 }, // a connection that is gone is noticed, and made again
);
const metadata = new grpc.Metadata();
if (token) metadata.set('authorization', `Bearer ${token}`);

const call = (method, request) =>
  new Promise((resolve, reject) => {
    const options = { deadline: Date.now() + DEADLINE_MS };
    client[method](request, metadata, options, (error, answer) => (error ? reject(error) : resolve(answer)));
  });

const question = (req, permission) => ({ organization_id: req.orgId, user_id: req.user.id, permission });

/** Whether the user of the request has the permission in the organization of the request. */
const check = async (req, key) => {
  const { allowed } = await call('CheckPermission', question(req, key));
  return allowed === true;
};

/** The same of several permissions with one call, in their order. */
const checkAll = async (req, keys) => {
  const { results } = await call('BatchCheckPermissions', { items: keys.map((key) => question(req, key)) });
  if (results.length !== keys.length) throw new Error(`${results.length} answers to ${keys.length} questions`);
  return results.map(({ result, answer, error }) => {
    if (result !== 'answer') throw new Error(error.message);
    return answer.allowed === true;
  });
};

/** Middleware that goes on if `decide` says so; `denied` is what the body of a 403 has besides its `error`. */
const permit = (decide, denied) => async (req, res, next) => {
  if (!req.user || !req.orgId) {
    return res.status(401).json({ error: 'Authentication required' });
  }
  let allowed;
  try {
    allowed = await decide(req);
  } catch (error) {
    console.error(`cannot check ${denied.permission ?? denied.permissions} for user ${req.user.id}: ${error.message}`);
    return res.status(503).json({ error: 'Permission check failed' });
  }
  if (!allowed) {
    return res.status(403).json({ error: 'Insufficient permissions', ...denied });
  }
  next();
};

/** Lets pass whose role, or name, has the permission `permissionKey` in `req.orgId`. */
export const requireOrgPermission = (permissionKey) =>
  permit((req) => check(req, permissionKey), {
    permission: permissionKey,
    message: 'Your role does not have permission to perform this action. Contact your organization administrator.',
  });

/** Lets pass who has all of the permissions (`AND`), or any of them (`OR`). */
export const requireMultiplePermissions = (permissionKeys, operator = 'AND') => {
  // No permission at all would be had by everyone.
  if (!['AND', 'OR'].includes(operator) || permissionKeys.length === 0) {
    throw new TypeError("requireMultiplePermissions needs permissions, and 'AND' or 'OR'");
  }
  const decide = async (req) => {
    const allowed = await checkAll(req, permissionKeys);
    return operator === 'AND' ? allowed.every(Boolean) : allowed.some(Boolean);
  };
  return permit(decide, {
    permissions: permissionKeys,
    operator,
    message: 'Your role does not have the required permissions to perform this action.',
  });
};
